"""The Fisher blocks of the example on the paper's assumptions, against naive computations."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import keras_kfc
from examples import assumptions, fisher_blocks

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model():
    keras.utils.set_random_seed(3)
    return keras.Sequential(
        [
            keras.Input((5, 5, 2)),
            layers.Conv2D(3, 3, strides=2, padding="valid", bias_initializer="normal"),
            layers.ReLU(),
            layers.Flatten(),
            layers.Dense(4),
            layers.Softmax(),
        ]
    )


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).normal(size=(6, 5, 5, 2)).astype("float32")


@pytest.fixture(scope="module")
def statistics(model, images):
    return fisher_blocks.statistics_of(model, model.layers[0], images)


def test_exact_block_is_the_mean_of_squared_gradients(model, images, statistics):
    layer = model.layers[0]
    expected = np.zeros((19 * 3, 19 * 3))
    for image in images:
        for label in range(4):
            with tf.GradientTape() as tape:
                probability = model(image[None])[0, label]
                loss = -tf.math.log(probability)
            kernel, bias = tape.gradient(loss, [layer.kernel, layer.bias])
            joint = np.concatenate([np.reshape(kernel, (18, 3)), bias.numpy()[None]]).ravel()
            expected += float(probability) * np.outer(joint, joint) / len(images)
    np.testing.assert_allclose(
        fisher_blocks.exact_block(statistics), expected, atol=1e-5 * np.abs(expected).max()
    )


def test_all_assumptions_together_give_the_kronecker_factors(model, images, statistics):
    factors = keras_kfc.kronecker_factors(
        model, images, loss="sparse_categorical_crossentropy", fisher="exact"
    )[model.layers[0].path]
    expected = np.kron(factors.omega, factors.gamma)
    found = fisher_blocks.approximations(statistics)["homogeneous"]
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


def test_independence_sums_over_pairs_of_positions(statistics):
    found = fisher_blocks.approximations(statistics)
    a, d = statistics.patches, statistics.weighted
    independent, uncorrelated = np.zeros((57, 57)), np.zeros((57, 57))
    for t in range(4):
        for u in range(4):
            second = sum(a[b, t][:, None] * a[b, u] for b in range(6)) / 6
            derivative = sum(d[c, b, t][:, None] * d[c, b, u] for c in range(4) for b in range(6))
            independent += np.kron(second, derivative / 6)
            if t == u:
                uncorrelated += np.kron(second, derivative / 6)
    np.testing.assert_allclose(found["independent"], independent, atol=1e-12)
    np.testing.assert_allclose(found["uncorrelated"], uncorrelated, atol=1e-12)


def test_assumptions_hold_where_they_must_and_cost_elsewhere(statistics):
    """Exact for one image and one position; neither is, for many of both."""
    one = fisher_blocks.Statistics(
        statistics.patches[:1, :1],
        statistics.derivatives[:, :1, :1],
        statistics.weights[:, :1],
        (1, 1),
    )
    for matrix in fisher_blocks.approximations(one).values():
        assert fisher_blocks.relative_error(matrix, fisher_blocks.exact_block(one)) < 1e-12
    for matrix in fisher_blocks.approximations(statistics).values():
        assert fisher_blocks.relative_error(matrix, fisher_blocks.exact_block(statistics)) > 0.05


def test_nearest_kronecker_product_is_nearest(statistics):
    block = fisher_blocks.exact_block(statistics)
    nearest = fisher_blocks.nearest_kronecker_product(block, 19, 3)
    error = fisher_blocks.relative_error(nearest, block)
    ours = fisher_blocks.approximations(statistics)["homogeneous"]
    scale = np.sum(ours * block) / np.sum(ours**2)
    assert error < fisher_blocks.relative_error(scale * ours, block)
    product = np.kron(block[:19, :19], block[:3, :3])
    again = fisher_blocks.nearest_kronecker_product(product, 19, 3)
    assert fisher_blocks.relative_error(again, product) < 1e-10


def test_partial_traces_make_a_product_what_it_is_and_keep_the_trace(statistics):
    block = fisher_blocks.exact_block(statistics)
    product = np.kron(block[:19, :19], block[:3, :3])
    again = fisher_blocks.product_of_partial_traces(product, 19, 3)
    assert fisher_blocks.relative_error(again, product) < 1e-10
    ours = fisher_blocks.product_of_partial_traces(block, 19, 3)
    assert np.trace(ours) == pytest.approx(np.trace(block))
    nearest = fisher_blocks.nearest_kronecker_product(block, 19, 3)
    errors = [fisher_blocks.relative_error(matrix, block) for matrix in (nearest, ours)]
    homogeneous = fisher_blocks.approximations(statistics)["homogeneous"]
    assert errors[0] < errors[1] < fisher_blocks.relative_error(homogeneous, block)


def test_cosine_of_natural_gradients_tells_good_from_bad(statistics):
    block = fisher_blocks.exact_block(statistics)
    assert fisher_blocks.natural_cosine(block, block, 0.1) == pytest.approx(1)
    assert fisher_blocks.natural_cosine(np.eye(57) * np.trace(block) / 57, block, 0.1) < 0.9


def test_correlations_of_noise_and_of_constant_maps():
    noise = np.random.default_rng(0).normal(size=(400, 36, 2))
    found = fisher_blocks.correlations(noise, (6, 6), 2)
    assert found.shape == (5, 5) and found[2, 2] == pytest.approx(1)
    found[2, 2] = 0
    assert np.abs(found).max() < 0.05
    constant = np.repeat(noise[:, :1], 36, axis=1)
    np.testing.assert_allclose(fisher_blocks.correlations(constant, (6, 6), 2), 1)


def test_maps_of_moments_show_where_the_power_is():
    values = np.zeros((3, 6, 2))
    values[:, 4] = 2.0
    np.testing.assert_allclose(fisher_blocks.map_of_moments(values, (2, 3)), [[0, 0, 0], [0, 6, 0]])


@pytest.mark.nightly
def test_the_example_runs(tmp_path, capsys):
    assert assumptions.main(["--quick", "--output", str(tmp_path)]) == 0
    assert "nearest Kronecker product" in capsys.readouterr().out
    assert (tmp_path / "assumptions-digits-quick.png").read_bytes().startswith(b"\x89PNG")
    missing = ["--dataset", "fashion-mnist", "--data-dir", str(tmp_path)]
    assert assumptions.main(missing) == 1
    assert "is missing" in capsys.readouterr().err
