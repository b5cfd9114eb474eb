"""What every layer kind and its linear map must do, whatever they are.

The main test needs no formula of a kind's own. A layer is linear up to its activation, `s = ā W̄`
for each position. So the gradient of `½ Σ s²` with regard to `W̄` is `(Σ ā āᵀ) W̄`: what automatic
differentiation says of the layer must be what the map makes of its inputs.
"""

import inspect

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_kfc
from conftest import relative_error
from keras_kfc._compat.keras_internals import mask_of, set_mask
from keras_kfc.curvature.api import STRUCTURES
from keras_kfc.layers.api import LayerKind
from keras_kfc.layers.instrumented import CAPTURING_CLASSES, is_marked
from keras_kfc.maps.api import LinearMap, input_factor, output_factor

# A line for each layer kind: options, and shape of an example.
KINDS = {
    "Conv1D": [
        ({"filters": 4, "kernel_size": 3}, (7, 2)),
        ({"filters": 4, "kernel_size": 2, "strides": 2, "padding": "same", "groups": 2}, (7, 6)),
        ({"filters": 3, "kernel_size": 3, "dilation_rate": 2, "padding": "causal"}, (7, 2)),
    ],
    "Conv2D": [
        ({"filters": 4, "kernel_size": (3, 2)}, (6, 5, 2)),
        ({"filters": 4, "kernel_size": 3, "strides": 2, "padding": "same", "groups": 2}, (6, 5, 4)),
        ({"filters": 3, "kernel_size": 2, "dilation_rate": 2, "use_bias": False}, (6, 5, 3)),
    ],
    "Conv3D": [
        ({"filters": 4, "kernel_size": (2, 3, 2)}, (4, 5, 3, 2)),
        ({"filters": 4, "kernel_size": 3, "strides": (2, 1, 2), "padding": "same"}, (5, 4, 6, 2)),
        ({"filters": 4, "kernel_size": (3, 1, 2), "groups": 2, "padding": "same"}, (4, 3, 4, 6)),
        ({"filters": 3, "kernel_size": 2, "dilation_rate": 2, "use_bias": False}, (6, 5, 4, 3)),
    ],
    "Dense": [
        ({"units": 3}, (4,)),
        ({"units": 3, "use_bias": False}, (5, 4)),
        ({"units": 2}, (3, 5, 4)),
    ],
}
CASES = [(name, *case) for name, cases in KINDS.items() for case in cases]


def layer_and_inputs(name, options, shape):
    keras.utils.set_random_seed(3)
    layer = getattr(keras_kfc.layers, name)(**options, bias_initializer="normal", dtype="float64")
    inputs = tf.constant(np.random.default_rng(0).normal(size=(4, *shape)))
    return layer, inputs, layer(inputs)


def stacked(layer, kernel, bias):
    return layer.linear_map.stack_bias(kernel, bias if layer.use_bias else None)


def test_every_registered_kind_is_here():
    registered = {kind.__name__ for kind in CAPTURING_CLASSES.values()}
    assert not registered - set(KINDS), "These kinds have no line in KINDS"
    assert not set(KINDS) - registered, (
        "These are not registered: is there a class with @instruments(...) in keras_kfc/layers?"
    )
    assert all(getattr(keras_kfc.layers, name) in CAPTURING_CLASSES.values() for name in KINDS)


@pytest.mark.parametrize(("name", "options", "shape"), CASES)
def test_the_map_makes_of_the_inputs_what_differentiation_makes_of_the_layer(name, options, shape):
    layer, inputs, _ = layer_and_inputs(name, options, shape)
    variables = [layer.kernel.value] + ([layer.bias.value] if layer.use_bias else [])
    with tf.GradientTape() as tape:
        half_square = 0.5 * tf.reduce_sum(tf.square(layer(inputs)))
    gradients = [*tape.gradient(half_square, variables), None]
    expected = stacked(layer, *gradients[:2])
    weights = stacked(layer, layer.kernel.value, layer.bias.value if layer.use_bias else None)
    omega = input_factor(layer.linear_map, [inputs], tf.constant(4), layer.use_bias)
    assert relative_error(4.0 * omega @ weights, expected) < 1e-12, (
        "input_moments or stack_bias is not what the layer does: the order of rows must be the "
        "kernel's own, moments are sums over examples and positions, padding counts as zeros"
    )
    # Negative control: in another order of the rows it would not be.
    assert relative_error(4.0 * omega[:, ::-1] @ weights, expected) > 0.1


@pytest.mark.parametrize(("name", "options", "shape"), CASES)
def test_derivatives_become_rows_of_all_positions(name, options, shape):
    layer, inputs, outputs = layer_and_inputs(name, options, shape)
    linear_map = layer.linear_map
    rows = linear_map.derivative_rows(outputs)
    positions = int(linear_map.count_positions(inputs))
    columns = linear_map.outputs // linear_map.groups
    assert rows.shape == (linear_map.groups, positions, columns)
    # A channel of a group is one of the output's last axis.
    for group in range(linear_map.groups):
        own = outputs.numpy().reshape(positions, -1)[:, group * columns : (group + 1) * columns]
        np.testing.assert_array_equal(rows[group], own)
        gamma = output_factor(linear_map, [outputs])[group]
        assert relative_error(gamma, own.T @ own / positions) < 1e-12


@pytest.mark.parametrize(("name", "options", "shape"), CASES)
def test_rows_are_what_moments_are_of(name, options, shape):
    layer, inputs, _ = layer_and_inputs(name, options, shape)
    linear_map = layer.linear_map
    rows = linear_map.input_rows(inputs).numpy()
    positions = int(linear_map.count_positions(inputs))
    assert rows.shape == (linear_map.groups, positions, linear_map.kernel_rows)
    moment, total = linear_map.input_moments(inputs)
    assert relative_error(moment, rows.transpose(0, 2, 1) @ rows) < 1e-12
    assert relative_error(total, rows.sum(1)) < 1e-12
    # Positions of an example follow each other.
    first = linear_map.input_rows(inputs[:1]).numpy()
    np.testing.assert_array_equal(rows[:, : first.shape[1]], first)


@pytest.mark.parametrize(("name", "options", "shape"), CASES)
def test_weights_are_stacked_and_unstacked(name, options, shape):
    layer, _, _ = layer_and_inputs(name, options, shape)
    linear_map = layer.linear_map
    bias = layer.bias.value if layer.use_bias else None
    weights = linear_map.stack_bias(layer.kernel.value, bias)
    rows = linear_map.kernel_rows + layer.use_bias
    assert weights.shape == (linear_map.groups, rows, linear_map.outputs // linear_map.groups)
    kernel, again = linear_map.unstack_bias(weights)
    np.testing.assert_array_equal(kernel, layer.kernel)
    assert (again is None) == (not layer.use_bias)
    if again is not None:
        np.testing.assert_array_equal(again, layer.bias)


@pytest.mark.parametrize(("name", "options", "shape"), CASES)
def test_the_map_has_the_members_of_the_protocol(name, options, shape):
    layer, _, _ = layer_and_inputs(name, options, shape)
    for protocol, thing in ((LinearMap, layer.linear_map), (LayerKind, layer)):
        for member, _ in inspect.getmembers(protocol):
            assert member.startswith("_") or hasattr(thing, member), member
    assert layer.curvature_structure in {None, *STRUCTURES}


@pytest.mark.parametrize("name", KINDS)
def test_a_capture_sees_the_inputs_and_derivatives_of_a_use(name):
    options, shape = KINDS[name][0]
    layer, inputs, _ = layer_and_inputs(name, options, shape)
    with keras_kfc.Capture() as capture:
        outputs = layer(inputs)
        loss = tf.reduce_sum(outputs**3)
    assert capture.records, "The layer's call must send its pre-activation through self._observe"
    (record,) = capture.records.values()
    (use,) = record.uses
    assert use.inputs is inputs and record.linear_map == layer.linear_map
    ((derivative,),) = capture.differentiate([loss], [tf.ones_like(loss)]).values()
    assert relative_error(derivative, 3 * outputs**2) < 1e-12


@pytest.mark.parametrize(("name", "options", "shape"), CASES)
def test_parts_are_of_channels_cut_in_two(name, options, shape):
    """Each part sees half of a group's channels, the last one filled up with zeros."""
    layer, inputs, _ = layer_and_inputs(name, options, shape)
    linear_map = layer.linear_map
    channels = linear_map.inputs // linear_map.groups
    if linear_map.groups > 1 and channels % 2:
        return
    moments, totals = linear_map.input_moments(inputs, 2)
    rows = linear_map.input_rows(inputs).numpy()
    rows = rows.reshape(*rows.shape[:2], -1, channels)
    rows = np.pad(rows, [(0, 0)] * 3 + [(0, channels % 2)])
    half = rows.shape[-1] // 2
    parts = [rows[..., :half], rows[..., half:]]
    cut = np.stack([part.reshape(*rows.shape[:2], -1) for part in parts], 1)
    cut = cut.reshape(-1, *cut.shape[2:])
    assert relative_error(moments, cut.transpose(0, 2, 1) @ cut) < 1e-12
    assert relative_error(totals, cut.sum(1)) < 1e-12


@pytest.mark.parametrize("name", KINDS)
def test_a_layer_is_keras_own_but_for_what_it_records(name, tmp_path):
    """With an activation: what is recorded comes before it, what comes out after it."""
    options, shape = KINDS[name][0]
    kind, plain = getattr(keras_kfc.layers, name), getattr(keras.layers, name)
    layers = []
    for cls in (kind, plain):
        keras.utils.set_random_seed(3)
        layers.append(cls(**options, activation="tanh", bias_initializer="normal"))
    inputs = np.random.default_rng(0).normal(size=(4, *shape)).astype("float32")
    with keras_kfc.Capture() as capture:
        outputs = layers[0](inputs)
    np.testing.assert_array_equal(outputs, layers[1](inputs))
    (record,) = capture.records.values()
    np.testing.assert_allclose(np.tanh(record.uses[0].pre_activation), outputs, atol=1e-6)
    assert is_marked(layers[0]), "KroneckerLayer must be the first base, Keras's class the second"
    # Equal layers have equal maps, which can be keys.
    assert len({layers[0].linear_map, layers[0].linear_map}) == 1
    model = keras.Sequential([keras.Input(shape), layers[0]])
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert type(loaded.layers[0]) is kind
    np.testing.assert_array_equal(loaded(inputs), outputs)


@pytest.mark.parametrize("name", KINDS)
def test_only_kinds_that_keep_positions_say_so(name):
    """A mask of the input is one of the output only where Keras hands it on."""
    options, shape = KINDS[name][0]
    if len(shape) < 2:
        options, shape = KINDS[name][1]
    layer, inputs, _ = layer_and_inputs(name, options, shape)
    mask = tf.ones(inputs.shape[:2], tf.bool)
    set_mask(inputs, mask)
    kept = mask_of(layer(inputs)) is not None
    assert layer.linear_map.keeps_positions == kept
