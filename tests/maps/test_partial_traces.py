"""Factors in the setting "trace", against the Fisher block itself."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_kfc
from conftest import relative_error
from keras_kfc.curvature.api import STRUCTURES
from keras_kfc.maps.conv import Conv2DMap
from keras_kfc.maps.dense import DenseMap
from keras_kfc.maps.einsum import EinsumMap
from keras_kfc.maps.partial_traces import pairs_are_cheaper

RNG = np.random.default_rng(0)
# A map, the shapes of inputs and derivatives of six examples, and which way is the cheapest.
CASES = {
    "dense": (DenseMap(5, 3), (6, 5), (6, 3), "single"),
    "dense, steps": (DenseMap(5, 4), (6, 2, 5), (6, 2, 4), "pairs"),
    "dense, many steps": (DenseMap(5, 3), (6, 9, 7, 5), (6, 9, 7, 3), "examples"),
    "einsum": (
        EinsumMap("abc", "cde", "abde", (5, 2, 3), (2, 3)),
        (6, 2, 5),
        (6, 2, 2, 3),
        "pairs",
    ),
    "heads": (EinsumMap("abcd", "cde", "abce", (3, 5, 4)), (6, 2, 3, 5), (6, 2, 3, 4), "pairs"),
    "conv": (Conv2DMap((2, 2), 3, 4), (6, 3, 3, 3), (6, 2, 2, 4), "examples"),
    "groups": (Conv2DMap((2, 2), 4, 6, groups=2), (6, 9, 9, 4), (6, 8, 8, 6), "examples"),
    "channels first": (
        Conv2DMap((2, 2), 3, 4, data_format="channels_first"),
        (6, 3, 4, 5),
        (6, 4, 3, 4),
        "examples",
    ),
}


def factors(linear_map, inputs, derivatives, masks=(None,), use_bias=True, max_dim=None):
    layout = STRUCTURES["kronecker"].layout(linear_map, use_bias, max_dim, "trace")
    pair = [tf.constant(a) for a in inputs], [tf.constant(d) for d in derivatives]
    assert layout.from_inputs(pair[0], tf.constant(6), list(masks)) == ()
    return [one.numpy() for one in layout.from_pass(*pair, tf.constant(6), list(masks))]


def example_derivatives(linear_map, a, ds, use_bias=True):
    """`D` of each example by the gradient of a loss whose derivative is `ds`, `(6, G, n, m)`."""
    rows = linear_map.input_rows(tf.constant(a)).numpy()
    columns = linear_map.derivative_rows(tf.constant(ds)).numpy()
    groups = len(rows)
    rows, columns = (part.reshape(groups, 6, -1, part.shape[2]) for part in (rows, columns))
    if use_bias:
        rows = np.concatenate((rows, np.ones_like(rows[..., :1])), axis=3)
    return np.einsum("gbti,gbtj->bgij", rows, columns)


@pytest.mark.parametrize("use_bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("case", CASES)
def test_both_are_partial_traces_of_the_fisher_block(case, use_bias):
    linear_map, in_shape, out_shape, way = CASES[case]
    a, ds = RNG.normal(size=in_shape), RNG.normal(size=out_shape)
    omega, gamma = factors(linear_map, [a], [ds], use_bias=use_bias)
    each = example_derivatives(linear_map, a, ds, use_bias)
    groups, n, m = each.shape[1:]
    positions = int(np.prod(out_shape[1:])) // linear_map.outputs
    cheaper = "pairs" if pairs_are_cheaper(positions, n, m) else "examples"
    assert way == ("single" if positions == 1 else cheaper)
    for group in range(groups):
        flat = each[:, group].reshape(6, -1)
        fisher = (flat.T @ flat / 6).reshape(n, m, n, m)
        assert relative_error(omega[group], np.einsum("iojo->ij", fisher)) < 1e-12
        assert relative_error(gamma[group], np.einsum("ioip->op", fisher)) < 1e-12
        assert np.trace(omega[group]) == pytest.approx(np.trace(flat.T @ flat) / 6)


def test_the_block_is_exact_where_it_is_a_kronecker_product():
    """Inputs and derivatives that are independent, all pairs of both being the batch."""
    inputs, derivatives = RNG.normal(size=(2, 5)), RNG.normal(size=(3, 4))
    a, ds = np.repeat(inputs, 3, axis=0), np.tile(derivatives, (2, 1))
    linear_map = DenseMap(5, 4)
    layout = STRUCTURES["kronecker"].layout(linear_map, True, None, "trace")
    moments = factors(linear_map, [a], [ds])
    form = layout.eigenform(moments)
    flat = example_derivatives(linear_map, a, ds).reshape(6, -1)
    fisher = flat.T @ flat / 6
    block = np.stack([form.weights(form.values * form.coordinates(e)) for e in unit_weights(6, 4)])
    assert relative_error(block.reshape(24, 24), fisher) < 1e-12
    # Negative control: where they depend on each other it is not, but has the same trace.
    dependent = a[:, :4] * ds
    flat = example_derivatives(linear_map, a, dependent).reshape(6, -1)
    form = layout.eigenform(factors(linear_map, [a], [dependent]))
    block = np.stack([form.weights(form.values * form.coordinates(e)) for e in unit_weights(6, 4)])
    assert relative_error(block.reshape(24, 24), flat.T @ flat / 6) > 0.1
    assert np.trace(block.reshape(24, 24)) == pytest.approx(np.square(flat).sum() / 6)


def unit_weights(rows, columns):
    return np.eye(rows * columns).reshape(-1, 1, rows, columns)


def test_it_is_the_nearer_of_the_settings_to_a_block_whose_positions_are_correlated():
    linear_map = DenseMap(4, 3)
    a, ds = (RNG.normal(size=(6, 1, k)) + 0.5 * RNG.normal(size=(6, 5, k)) for k in (4, 3))
    ds = ds * RNG.gamma(0.5, size=(6, 1, 1))
    flat = example_derivatives(linear_map, a, ds).reshape(6, -1)
    fisher, errors = flat.T @ flat / 6, {}
    for setting in ("expand", "reduce", "trace"):
        layout = STRUCTURES["kronecker"].layout(linear_map, True, None, setting)
        pair = [tf.constant(a)], [tf.constant(ds)]
        own = layout.from_inputs(pair[0], tf.constant(6), [None])
        own += layout.from_pass(*pair, tf.constant(6), [None])
        omega, gamma = (part.numpy()[0] for part in own)
        gamma = gamma / np.trace(gamma) if setting == "trace" else gamma
        errors[setting] = relative_error(np.kron(omega, gamma), fisher)
    assert errors["trace"] < 0.9 * min(errors["expand"], errors["reduce"])


def test_positions_that_a_mask_leaves_out_count_nowhere():
    linear_map = DenseMap(5, 3)
    a, ds = RNG.normal(size=(6, 4, 5)), RNG.normal(size=(6, 4, 3))
    mask = np.arange(4) < RNG.integers(1, 4, (6, 1))
    broken = np.where(mask[..., None], a, np.nan)
    omega, gamma = factors(linear_map, [broken], [ds], [tf.constant(mask)])
    each = example_derivatives(linear_map, a, ds * mask[..., None])[:, 0]
    assert relative_error(omega[0], np.einsum("bij,bkj->ik", each, each) / 6) < 1e-12
    assert relative_error(gamma[0], np.einsum("bji,bjk->ik", each, each) / 6) < 1e-12


def test_uses_of_a_layer_add_up_whatever_their_batches():
    linear_map = DenseMap(5, 3)
    first = RNG.normal(size=(6, 4, 5)), RNG.normal(size=(6, 4, 3))
    second = RNG.normal(size=(7, 5)), RNG.normal(size=(7, 3))
    both = factors(linear_map, *zip(first, second, strict=True), [None, None])
    apart = [factors(linear_map, [a], [ds]) for a, ds in (first, second)]
    for together, one, other in zip(both, *apart, strict=True):
        assert relative_error(together, one + other) < 1e-12


@pytest.mark.parametrize("case", ["dense", "dense, steps", "dense, many steps", "conv"])
def test_wide_factors_are_cut_out_of_whole_ones(case):
    linear_map, in_shape, out_shape, _ = CASES[case]
    a, ds = RNG.normal(size=in_shape), RNG.normal(size=out_shape)
    omega, gamma = factors(linear_map, [a], [ds])
    limit = 9 if case == "conv" else 3
    cut, cut_gamma = factors(linear_map, [a], [ds], max_dim=limit)
    taps = linear_map.kernel_rows // linear_map.inputs
    channels = (limit - 1) // taps
    for part in range(len(cut)):
        own = range(part * channels, min((part + 1) * channels, linear_map.inputs))
        kept = [tap * channels + i for tap in range(taps) for i in range(len(own))]
        rows = [tap * linear_map.inputs + channel for tap in range(taps) for channel in own]
        if part == 0:
            kept, rows = [*kept, taps * channels], [*rows, taps * linear_map.inputs]
        else:
            assert np.all(cut[part][-1] == 0)
        assert relative_error(cut[part][np.ix_(kept, kept)], omega[0][np.ix_(rows, rows)]) < 1e-12
    width = cut_gamma.shape[1]
    assert relative_error(cut_gamma[0], gamma[0][:width, :width]) < 1e-12


def test_sequences_of_any_length_take_the_cheaper_way_when_they_run():
    linear_map = DenseMap(5, 4)
    layout = STRUCTURES["kronecker"].layout(linear_map, True, None, "trace")
    kinds = [tf.TensorSpec((None, None, size), tf.float64) for size in (5, 4)]

    @tf.function(input_signature=kinds)
    def measured(a, ds):
        return layout.from_pass([a], [ds], tf.shape(a)[0], [None])

    for steps in (2, 40):
        a, ds = RNG.normal(size=(6, steps, 5)), RNG.normal(size=(6, steps, 4))
        each = example_derivatives(linear_map, a, ds)[:, 0]
        omega, gamma = measured(a, ds)
        assert relative_error(omega[0], np.einsum("bij,bkj->ik", each, each) / 6) < 1e-12
        assert relative_error(gamma[0], np.einsum("bji,bjk->ik", each, each) / 6) < 1e-12


def test_pairs_are_cheaper_for_few_positions_of_wide_layers():
    assert pairs_are_cheaper(16, 256, 256) and not pairs_are_cheaper(1000, 256, 256)
    assert not pairs_are_cheaper(64, 8, 8)


def test_a_step_inverts_the_block_with_its_trace():
    """One step of a linear model whose block is damped by a part of its own mean eigenvalue."""
    keras.utils.set_random_seed(1)
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    keras_kfc.instrument(model)
    settings = {"momentum": 0.0, "fisher": "exact", "polyak_scaling": None, "weight_decay": None}
    optimizer = keras_kfc.KFC(10.0, damping=0.1, **settings)
    model.compile(optimizer, "mse")
    x, y = (RNG.normal(size=(32, k)).astype("float32") for k in (3, 2))
    before = model.layers[0].kernel.numpy(), model.layers[0].bias.numpy()
    model.train_on_batch(x, y)
    rows = np.pad(x.astype("float64"), ((0, 0), (0, 1)), constant_values=1)
    # Of a mean over two outputs the Hessian of each example is the identity.
    omega = 2 * rows.T @ rows / 32
    gamma = np.square(rows).sum() / 32 * np.eye(2)
    gamma /= np.trace(gamma)
    gradient = rows.T @ (x @ before[0] + before[1] - y) / 32
    root = np.sqrt(0.1)
    left = np.linalg.inv(omega + root * np.trace(omega) / 4 * np.eye(4))
    right = np.linalg.inv(gamma + root * np.trace(gamma) / 2 * np.eye(2))
    expected = left @ gradient @ right
    after = model.layers[0].kernel.numpy(), model.layers[0].bias.numpy()
    moved = np.concatenate((before[0] - after[0], (before[1] - after[1])[None]))
    assert relative_error(moved, 10 * expected) < 1e-4
