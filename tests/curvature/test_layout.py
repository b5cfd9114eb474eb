"""Factors cut into diagonal blocks, against the whole ones and explicit permutations."""

import itertools
import logging
import math

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import inverses_of

import keras_kfc
from conftest import relative_error
from keras_kfc.curvature.layout import KroneckerLayout, layout_of
from keras_kfc.linalg.damping import BlockShape
from keras_kfc.maps.conv import Conv2DMap
from keras_kfc.maps.dense import DenseMap

CASES = [
    (DenseMap(6, 4), 1, 1),
    (DenseMap(6, 4), 3, 2),
    (DenseMap(7, 5), 3, 2),
    (Conv2DMap((2, 3), 4, 6), 2, 3),
    (Conv2DMap((2, 3), 4, 5), 4, 2),
    (Conv2DMap((2, 3), 5, 6), 2, 3),
    (Conv2DMap((3, 2), 7, 6), 3, 1),
    (Conv2DMap((2, 3), 8, 6, groups=2), 2, 3),
    (Conv2DMap((2, 3), 8, 6, groups=2), 1, 2),
    (Conv2DMap((2, 3), 8, 6, groups=2), 4, 1),
]


def rows_of_part(geometry, use_bias, parts, part):
    """Rows of a group's weights with bias that belong to a part, from the definition."""
    channels = geometry.inputs // geometry.groups
    width = -(-channels // parts)
    own = range(part * width, min((part + 1) * width, channels))
    positions = geometry.kernel_rows // channels
    rows = [position * channels + channel for position in range(positions) for channel in own]
    return rows + [geometry.kernel_rows] * (use_bias and part == 0)


def masked(whole, groups, parts_of_rows):
    """The whole factor of each group with zeros outside of its diagonal blocks."""
    mask = np.zeros(whole.shape[1:])
    for rows in parts_of_rows:
        mask[np.ix_(rows, rows)] = 1
    return whole * mask


def columns_of_parts(geometry, parts):
    columns = geometry.outputs // geometry.groups
    width = -(-columns // parts)
    return [list(range(q * width, min((q + 1) * width, columns))) for q in range(parts)]


def inputs_and_derivatives(geometry):
    rng = np.random.default_rng(0)
    if isinstance(geometry, DenseMap):
        return rng.normal(size=(9, geometry.inputs)), rng.normal(size=(9, geometry.outputs))
    images = rng.normal(size=(3, 5, 6, geometry.inputs))
    return images, rng.normal(size=(3, 4, 4, geometry.outputs))


@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize(("geometry", "input_parts", "output_parts"), CASES)
def test_cut_factors_act_as_the_whole_ones_without_correlations_between_parts(
    geometry, input_parts, output_parts, use_bias
):
    """Both moments and products, for every cut: blocks of zeros, nothing else, are left out."""
    inputs, derivatives = map(tf.constant, inputs_and_derivatives(geometry))
    whole = KroneckerLayout(geometry, use_bias)
    cut = KroneckerLayout(geometry, use_bias, input_parts, output_parts)
    omega, gamma = cut.omega([inputs], 3), cut.gamma([derivatives])
    assert omega.shape == cut.omega_shape
    assert gamma.shape == cut.gamma_shape
    row_parts = [rows_of_part(geometry, use_bias, input_parts, p) for p in range(input_parts)]
    expected_omega = masked(whole.omega([inputs], 3).numpy(), geometry.groups, row_parts)
    expected_gamma = masked(
        whole.gamma([derivatives]).numpy(),
        geometry.groups,
        columns_of_parts(geometry, output_parts),
    )
    shape = (geometry.groups, expected_omega.shape[1], expected_gamma.shape[1])
    joint = np.random.default_rng(1).normal(size=shape)
    result = cut.multiply(omega, tf.constant(joint), gamma)
    np.testing.assert_allclose(result, expected_omega @ joint @ expected_gamma, atol=1e-10)
    if max(input_parts, output_parts) > 1:
        uncut = whole.multiply(
            whole.omega([inputs], 3), tf.constant(joint), whole.gamma([derivatives])
        )
        assert relative_error(result, uncut) > 1e-2


@pytest.mark.parametrize("relative", [True, False])
@pytest.mark.parametrize(("inputs", "outputs"), [(4, 4), (5, 3)])
@pytest.mark.parametrize("use_bias", [True, False])
def test_parts_are_damped_as_the_whole(relative, inputs, outputs, use_bias):
    """Where correlations between parts are zero anyway, cutting changes nothing at all.

    Nor does what parts are filled up with.
    """
    rng = np.random.default_rng(0)
    # The first part is never active together with the second, nor that with the bias:
    # each example of it comes with its opposite. Scales differ.
    width = -(-inputs // 2)
    a = np.zeros((12, inputs))
    a[:6, :width] = rng.normal(size=(6, width))
    a[6:9, width:] = 5 * rng.normal(size=(3, inputs - width))
    a[9:] = -a[6:9]
    half = -(-outputs // 2)
    derivatives = np.zeros((12, outputs))
    derivatives[::2, :half] = rng.normal(size=(6, half))
    derivatives[1::2, half:] = rng.normal(size=(6, outputs - half))
    geometry = DenseMap(inputs, outputs)
    joint = tf.constant(rng.normal(size=(1, inputs + use_bias, outputs)))
    results = []
    for parts in (1, 2):
        partition = KroneckerLayout(geometry, use_bias, parts, parts)
        omega = partition.omega([tf.constant(a)], 12)
        gamma = partition.gamma([tf.constant(derivatives)])
        (omega,), (gamma,) = inverses_of([omega], [gamma], [partition.block_shape], 0.1, relative)
        results.append(partition.multiply(omega, joint, gamma).numpy())
    np.testing.assert_allclose(results[1], results[0], rtol=1e-9)


def test_damping_of_a_dead_part_is_that_of_its_group():
    omega = tf.constant(np.stack([4 * np.eye(2), np.zeros((2, 2))]))
    gamma = tf.constant(np.eye(3)[None])
    (omega_inverse,), (gamma_inverse,) = inverses_of(
        [omega], [gamma], [BlockShape(1, 4, 3)], 0.25, True
    )
    # The mean eigenvalue of omega is 2, that of gamma 1; damping adds half of each.
    expected = np.stack([np.eye(2) / (4 + 1), np.eye(2) / (0 + 1)])
    np.testing.assert_allclose(omega_inverse, expected)
    np.testing.assert_allclose(gamma_inverse, np.eye(3)[None] / 1.5)


def test_relative_damping_of_blocks_of_every_kind_together():
    """Groups, parts, a dead block, and two dtypes in one network, from the definition."""
    rng = np.random.default_rng(0)

    def factor(count, size, dtype="float64"):
        root = rng.normal(size=(count, size, 3 * size))
        return (root @ root.transpose(0, 2, 1) * rng.uniform(0.1, 10, (count, 1, 1))).astype(dtype)

    shapes = [BlockShape(1, 4, 3), BlockShape(2, 5, 2), BlockShape(1, 6, 3), BlockShape(1, 2, 3)]
    omegas = [factor(1, 4, "float32"), factor(2, 5), factor(2, 3), factor(1, 2)]
    gammas = [factor(1, 3, "float32"), factor(2, 2), factor(1, 3), np.zeros((1, 3, 3))]
    inverses = inverses_of(
        list(map(tf.constant, omegas)), list(map(tf.constant, gammas)), shapes, 0.3, True
    )
    means = [
        (
            np.trace(omega, axis1=1, axis2=2).reshape(groups, -1).sum(1) / rows,
            np.trace(gamma, axis1=1, axis2=2).reshape(groups, -1).sum(1) / columns,
        )
        for omega, gamma, (groups, rows, columns) in zip(omegas, gammas, shapes, strict=True)
    ]
    sizes = [shape.rows * shape.columns for shape in shapes]
    trace = sum(size * (a * b).sum() for size, (a, b) in zip(sizes, means, strict=True))
    network_mean = trace / sum(math.prod(shape) for shape in shapes)
    # The dead gamma gets what makes its block's mean eigenvalue that of the network.
    means[3] = (means[3][0], network_mean / means[3][0])
    for matrices, results, side in zip((omegas, gammas), inverses, (0, 1), strict=True):
        for matrix, result, mean in zip(matrices, results, means, strict=True):
            assert result.dtype == matrix.dtype
            shift = np.repeat(np.sqrt(0.3) * mean[side], len(matrix) // len(mean[side]))
            damped = matrix + shift[:, None, None] * np.eye(matrix.shape[-1])
            tolerance = 1e-4 if matrix.dtype == "float32" else 1e-6
            np.testing.assert_allclose(result, np.linalg.inv(damped), rtol=tolerance, atol=1e-6)


def test_parts_stay_within_the_limit_and_are_as_few_as_possible():
    for limit, use_bias in itertools.product((8, 30, 100, 1000), (True, False)):
        for geometry in (DenseMap(250, 130), Conv2DMap((3, 3), 24, 64)):
            partition = layout_of(geometry, use_bias, limit)
            single_channel = geometry.kernel_rows // geometry.inputs + use_bias
            assert partition.omega_shape[1] <= max(limit, single_channel)
            assert partition.gamma_shape[1] <= limit
            if partition.input_parts > 1 and isinstance(geometry, DenseMap):
                fewer = KroneckerLayout(geometry, use_bias, partition.input_parts - 1)
                assert fewer.omega_shape[1] > limit
            if partition.output_parts > 1:
                fewer = KroneckerLayout(geometry, use_bias, 1, partition.output_parts - 1)
                assert fewer.gamma_shape[1] > limit
    assert layout_of(DenseMap(10**5, 10**5), True, None).input_parts == 1


def wide_model():
    keras.utils.set_random_seed(3)
    return keras.Sequential(
        [
            keras.Input((4, 4, 6)),
            keras_kfc.layers.Conv2D(20, 3, activation="tanh", name="conv"),
            keras.layers.Flatten(),
            keras_kfc.layers.Dense(3, activation="softmax", name="dense"),
        ]
    )


def test_wide_layers_train_in_parts_and_are_told_with_figures(caplog):
    images = np.random.default_rng(0).normal(size=(64, 4, 4, 6)).astype("float32")
    labels = (images.mean(axis=(1, 2, 3)) > 0).astype("int32")
    model = wide_model()
    optimizer = keras_kfc.KFC(max_factor_dim=30, seed=1)
    model.compile(optimizer=optimizer, loss="sparse_categorical_crossentropy")
    with caplog.at_level(logging.INFO, "keras_kfc"):
        history = model.fit(images, labels, epochs=10, batch_size=64, verbose=0)
    assert history.history["loss"][-1] < 0.7 * history.history["loss"][0]
    shapes = {block.path.split("/")[-1]: block.omega.shape for block in optimizer.blocks}
    assert shapes == {"conv": (2, 28, 28), "dense": (3, 28, 28)}
    assert int(optimizer.rejected_inverse_updates) == 0
    (message,) = [r.getMessage() for r in caplog.records if "max_factor_dim" in r.getMessage()]
    assert "max_factor_dim=30 rows" in message
    assert "sequential/conv: input factor of 55 rows (23.6 KiB, 1.7e+05 products)" in message
    assert "now 2 blocks of 28 rows (12.2 KiB, 4.4e+04 products)" in message


@pytest.mark.slow
def test_a_limit_that_no_factor_reaches_changes_nothing(caplog):
    images = np.random.default_rng(0).normal(size=(32, 4, 4, 6)).astype("float32")
    weights = []
    for limit in (None, 81):
        model = wide_model()
        model.compile(
            optimizer=keras_kfc.KFC(max_factor_dim=limit, seed=1),
            loss="sparse_categorical_crossentropy",
        )
        with caplog.at_level(logging.INFO, "keras_kfc"):
            model.fit(images, np.arange(32) % 3, epochs=4, batch_size=32, verbose=0)
        weights.append(np.concatenate([w.ravel() for w in model.get_weights()]))
    np.testing.assert_allclose(weights[1], weights[0], atol=1e-6)
    assert "diagonal blocks" not in caplog.text


@pytest.mark.parametrize("max_dim", [None, 20, 11])
@pytest.mark.parametrize("kind", ["convolution", "grouped", "dense"])
def test_rows_that_fill_up_are_those_without_any_data(kind, max_dim):
    rng = np.random.default_rng(0)
    if kind == "dense":
        layer, shape = keras_kfc.layers.Dense(13), (7, 29)
    else:
        groups = 2 if kind == "grouped" else 1
        layer, shape = keras_kfc.layers.Conv2D(14, 2, groups=groups), (7, 5, 5, 14)
    inputs = tf.constant(rng.uniform(0.1, 1, size=shape).astype("float32"))
    derivatives = tf.ones_like(layer(inputs))
    partition = layout_of(layer.linear_map, True, max_dim)
    omega = partition.omega([inputs], tf.constant(7)).numpy()
    gamma = partition.gamma([derivatives]).numpy()
    for factor, rows in ((omega, partition.omega_row_mask), (gamma, partition.gamma_row_mask)):
        np.testing.assert_array_equal(np.abs(factor).sum(-1) > 1e-6, rows)


@pytest.mark.parametrize("use_bias", [True, False])
def test_products_of_rows_have_their_shape_whatever_the_batch(use_bias):
    """Of a cut factor, too, in a graph for any batch size: a last batch is smaller."""
    layout = layout_of(DenseMap(9, 4), use_bias, 4)
    rng = np.random.default_rng(0)
    omega, gamma = rng.normal(size=layout.omega_shape), rng.normal(size=layout.gamma_shape)
    graph = tf.function(layout.multiply_product, autograph=False).get_concrete_function(
        tf.TensorSpec(omega.shape, tf.float64),
        tf.TensorSpec((1, None, 9 + use_bias), tf.float64),
        tf.TensorSpec((1, None, 4), tf.float64),
        tf.TensorSpec(gamma.shape, tf.float64),
    )
    left, right = graph.output_shapes
    assert left.as_list() == [1, 9 + use_bias, None] and right.as_list() == [1, None, 4]
    inputs, derivatives = rng.normal(size=(1, 5, 9 + use_bias)), rng.normal(size=(1, 5, 4))
    whole = layout.multiply(omega, np.swapaxes(inputs, 1, 2) @ derivatives, gamma)
    left, right = graph(*map(tf.constant, (omega, inputs, derivatives, gamma)))
    assert relative_error((left @ right).numpy(), whole.numpy()) < 1e-12


@pytest.mark.slow
def test_a_wide_layer_trains_where_the_last_batch_is_smaller():
    model = keras_kfc.instrument(
        keras.Sequential([keras.Input((1200,)), keras.layers.Dense(32), keras.layers.Dense(1)])
    )
    model.compile(keras_kfc.KFC(seed=0), "mse")
    x = np.random.default_rng(0).normal(size=(40, 1200))
    losses = model.fit(x, x[:, :1], batch_size=16, epochs=3, verbose=0).history["loss"]
    assert losses[-1] < losses[0]
