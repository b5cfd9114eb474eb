"""What every layer kind and its linear maps must do, whatever they are.

The main test needs no formula of a kind's own. The gradient of any loss with regard to a matrix is
`Σ ā Dsᵀ` over all positions of all examples, for what was recorded of the inputs and for the
derivatives of the pre-activations: what automatic differentiation says of the variables must be
what the map makes of a capture.
"""

import inspect

import numpy as np
import tensorflow as tf
from layer_cases import CASES, CELLS, build, every, one_of_each

import keras_kfc
from conftest import relative_error
from keras_kfc.curvature.api import STRUCTURES
from keras_kfc.layers.api import LayerKind
from keras_kfc.layers.instrumented import CAPTURING_CLASSES, is_marked
from keras_kfc.linalg.products import gram, sum_of_rows
from keras_kfc.maps.api import LinearMap, input_factor, output_factor


def captured(case, training=True):
    """A model of one layer, a capture of a pass through it, and all gradients of a loss."""
    model, inputs = build(case)
    with tf.GradientTape() as tape, keras_kfc.Capture() as capture:
        outputs = model(inputs, training=training)
        loss = tf.reduce_sum(tf.sin(1.3 * outputs + 0.2))
    gradients = tape.gradient(loss, [variable.value for variable in model.trainable_variables])
    by_variable = {
        id(variable): tf.convert_to_tensor(gradient)
        for variable, gradient in zip(model.trainable_variables, gradients, strict=True)
    }
    derivatives = capture.differentiate([loss], [tf.ones_like(loss)])
    uses = {}
    for key, record in capture.records.items():
        pairs = zip(record.uses, derivatives[key], strict=True)
        uses[key] = [(use, derivative) for use, derivative in pairs if derivative is not None]
    return model, capture, uses, by_variable


def rows_of(matrix, use):
    rows = tf.cast(matrix.linear_map.input_rows(use.dense_inputs()), tf.float64)
    return rows if matrix.bias is None else tf.concat((rows, tf.ones_like(rows[..., :1])), 2)


def stacked(matrix, by_variable):
    bias = None if matrix.bias is None else by_variable[id(matrix.bias)]
    return matrix.linear_map.stack_bias(kernel_of(matrix, by_variable), bias)


def kernel_of(matrix, by_variable):
    parts = [by_variable[id(one)] for one in matrix.kernels]
    return tf.concat(parts, axis=0) if len(parts) > 1 else parts[0]


def test_every_registered_kind_is_here():
    ours = [kind for kind in CAPTURING_CLASSES.values() if kind.__module__.startswith("keras_kfc")]
    registered = {kind.__name__ for kind in ours}
    here = {case.kind for case in CASES} | set(CELLS)
    assert not registered - here, "These kinds have no line in layer_cases.py"
    assert not here - registered, (
        "These are not registered: is there a class with @instruments(...) in keras_kfc/layers?"
    )
    assert all(getattr(keras_kfc.layers, kind) in CAPTURING_CLASSES.values() for kind in here)


@every
def test_what_is_recorded_explains_the_gradient(case):
    _, capture, uses, by_variable = captured(case)
    assert capture.records, "The layer's call must send its pre-activation through self._observe"
    for key, record in capture.records.items():
        matrix, total = record.matrix, 0
        for use, derivative in uses[key]:
            columns = matrix.linear_map.derivative_rows(derivative)
            total += tf.matmul(rows_of(matrix, use), columns, transpose_a=True)
        expected = stacked(matrix, by_variable)
        assert relative_error(total, expected) < case.tolerance, (
            "input_rows, derivative_rows or stack_bias is not what the layer does: the order of "
            "rows must be that of stack_bias, and padding counts as zeros"
        )
        # Negative control: in another order of the positions it would not be.
        rows = rows_of(matrix, use)
        if len(uses[key]) == 1 and tf.math.reduce_std(rows) > 0:
            wrong = tf.matmul(rows, tf.roll(columns, 1, 1), transpose_a=True)
            assert relative_error(wrong, expected) > 1e-3


@every
def test_all_matrices_are_recorded_and_marked(case):
    model, capture, uses, _ = captured(case)
    recorded = {id(record.matrix.kernel) for record in capture.records.values() if uses}
    for layer in model._flatten_layers():
        kind = type(layer) in CAPTURING_CLASSES.values()
        if kind and layer.weight_matrices:
            assert is_marked(layer), "KroneckerLayer must be the first base, Keras's the second"
            assert {id(matrix.kernel) for matrix in layer.weight_matrices} <= recorded
            names = [matrix.name for matrix in layer.weight_matrices]
            assert len(set(names)) == len(names) and (len(names) == 1) == (names == [""])


@every
def test_derivatives_become_rows_of_all_positions(case):
    _, capture, uses, _ = captured(case)
    for key, record in capture.records.items():
        linear_map = record.linear_map
        for use, derivative in uses[key]:
            rows = linear_map.derivative_rows(derivative)
            positions = int(linear_map.count_positions(use.dense_inputs()))
            columns = linear_map.outputs // linear_map.groups
            assert rows.shape == (linear_map.groups, positions, columns)
            # Nothing is lost, and positions of an example follow each other.
            assert relative_error(tf.reduce_sum(rows**2), tf.reduce_sum(derivative**2)) < 1e-6
            examples = derivative.shape[0]
            first = linear_map.derivative_rows(derivative[:1])
            np.testing.assert_array_equal(rows[:, : positions // examples], first)
            gamma = output_factor(linear_map, [derivative])
            assert relative_error(gamma, gram(rows) / positions) < 1e-12


@every
def test_rows_are_what_moments_are_of(case):
    _, capture, uses, _ = captured(case)
    for key, record in capture.records.items():
        linear_map = record.linear_map
        for use, _ in uses[key]:
            inputs = use.dense_inputs()
            rows = linear_map.input_rows(inputs)
            positions = int(linear_map.count_positions(inputs))
            assert rows.shape == (linear_map.groups, positions, linear_map.kernel_rows)
            moment, total = linear_map.input_moments(inputs)
            assert relative_error(moment, gram(rows)) < 1e-6
            assert relative_error(total, sum_of_rows(rows)) < 1e-6
            use_bias = record.matrix.bias is not None
            if inputs.dtype.is_floating:
                omega = input_factor(linear_map, [inputs], tf.constant(4), use_bias)
                whole = tf.cast(rows_of(record.matrix, use), omega.dtype)
                assert relative_error(4.0 * omega, gram(whole)) < 1e-6


@every
def test_gradients_of_examples_are_sums_over_their_positions(case):
    """For maps that have a quick way to them: the same from rows, one example at a time."""
    _, capture, uses, _ = captured(case)
    for key, record in capture.records.items():
        quick = getattr(record.linear_map, "example_gradients", None)
        for use, derivative in uses[key] if quick else ():
            inputs, use_bias = use.dense_inputs(), record.matrix.bias is not None
            gradients = quick(inputs, derivative, use_bias)
            for example in range(derivative.shape[0]):
                own = slice(example, example + 1)
                rows = tf.cast(record.linear_map.input_rows(inputs[own]), tf.float64)
                if use_bias:
                    rows = tf.concat((rows, tf.ones_like(rows[..., :1])), 2)
                columns = record.linear_map.derivative_rows(derivative[own])
                expected = tf.matmul(rows, columns, transpose_a=True)
                assert relative_error(gradients[example], expected) < case.tolerance


@every
def test_weights_are_stacked_and_unstacked(case):
    model, _ = build(case)
    for layer in model._flatten_layers():
        for matrix in getattr(layer, "weight_matrices", ()):
            linear_map, bias = matrix.linear_map, matrix.bias
            own = {id(variable): variable.value for variable in layer.trainable_variables}
            joint = kernel_of(matrix, own)
            weights = linear_map.stack_bias(joint, None if bias is None else bias.value)
            rows = linear_map.kernel_rows + (bias is not None)
            columns = linear_map.outputs // linear_map.groups
            assert weights.shape == (linear_map.groups, rows, columns)
            kernel, again = linear_map.unstack_bias(weights)
            np.testing.assert_array_equal(kernel, joint)
            assert (again is None) == (bias is None)
            if again is not None:
                np.testing.assert_array_equal(again, bias)
            # Equal layers have equal maps, which can be keys.
            assert len({linear_map, type(linear_map)(**_fields(linear_map))}) == 1


def _fields(linear_map):
    fields = linear_map.__dataclass_fields__
    return {name: getattr(linear_map, name) for name, field in fields.items() if field.init}


@one_of_each
def test_the_map_has_the_members_of_the_protocol(case):
    model, _ = build(case)
    for layer in model._flatten_layers():
        if type(layer) not in CAPTURING_CLASSES.values():
            continue
        things = [(LayerKind, layer)]
        things += [(LinearMap, matrix.linear_map) for matrix in layer.weight_matrices]
        for protocol, thing in things:
            for member, _ in inspect.getmembers(protocol):
                assert member.startswith("_") or hasattr(thing, member), member
        assert all(m.structure in {None, *STRUCTURES} for m in layer.weight_matrices)


@every
def test_parts_are_of_channels_cut_in_two(case):
    """Each part sees half of a group's channels, the last one filled up with zeros."""
    _, capture, uses, _ = captured(case)
    for key, record in capture.records.items():
        linear_map = record.linear_map
        channels = linear_map.inputs // linear_map.groups
        whole = record.matrix.structure in ("full", "diagonal_input", "tied")
        if whole or (linear_map.groups > 1 and channels % 2):
            continue
        use, _ = uses[key][0]
        moments, totals = linear_map.input_moments(use.inputs, 2)
        rows = linear_map.input_rows(use.inputs).numpy()
        rows = rows.reshape(*rows.shape[:2], -1, channels)
        rows = np.pad(rows, [(0, 0)] * 3 + [(0, channels % 2)])
        half = rows.shape[-1] // 2
        parts = [rows[..., :half], rows[..., half:]]
        cut = np.stack([part.reshape(*rows.shape[:2], -1) for part in parts], 1)
        cut = cut.reshape(-1, *cut.shape[2:])
        assert relative_error(moments, cut.transpose(0, 2, 1) @ cut) < 1e-6
        assert relative_error(totals, cut.sum(1)) < 1e-6
