"""Second moments in the eigenbasis of Kronecker factors, by their definition in float64."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_kfc
from conftest import naive_patches, relative_error
from keras_kfc.curvature.averaging import move_averages
from keras_kfc.curvature.eigenbasis import Eigenbasis
from keras_kfc.maps.conv import Conv2DMap
from keras_kfc.maps.dense import DenseMap


def orthogonal(rng, size):
    return np.linalg.qr(rng.normal(size=(size, size)))[0]


def example_derivatives(case, inputs, derivatives):
    """`Σ_t ā_t Ds_tᵀ` of each example, by loops."""
    for a, ds in zip(inputs, derivatives, strict=True):
        if case == "conv":
            patches = list(naive_patches(a, (2, 2), (1, 1), "valid", (1, 1)))
        else:
            patches = list(a.reshape(-1, a.shape[-1]))
        rows = ds.reshape(len(patches), -1)
        yield sum(np.outer(np.append(p, 1.0), d) for p, d in zip(patches, rows, strict=True))


CASES = {
    "dense": (DenseMap(4, 3), (6, 4), (6, 3)),
    "positions": (DenseMap(4, 3), (6, 5, 4), (6, 5, 3)),
    "conv": (Conv2DMap((2, 2), 3, 4), (6, 4, 5, 3), (6, 3, 4, 4)),
}


@pytest.mark.parametrize("case", CASES)
def test_second_moments_are_mean_squares_of_coordinates(case):
    linear_map, in_shape, out_shape = CASES[case]
    rng = np.random.default_rng(0)
    inputs, derivatives = rng.normal(size=in_shape), rng.normal(size=out_shape)
    layout = Eigenbasis().layout(linear_map, True, None)
    _, n, m = layout.weights_shape
    left, right = orthogonal(rng, n), orthogonal(rng, m)
    turned = type(layout)(
        linear_map, True, vectors=(tf.constant(left[None]), tf.constant(right[None]))
    )
    *_, squares = turned.from_pass(
        [tf.constant(inputs)], [tf.constant(derivatives)], tf.constant(6), [None]
    )
    expected = np.mean(
        [(left.T @ d @ right) ** 2 for d in example_derivatives(case, inputs, derivatives)], axis=0
    )
    assert relative_error(squares.numpy()[0], expected) < 1e-10
    *_, plain = layout.from_pass(
        [tf.constant(inputs)], [tf.constant(derivatives)], tf.constant(6), [None]
    )
    assert relative_error(plain.numpy()[0], expected) > 0.1  # negative control


@pytest.mark.nightly
def test_no_diagonal_in_the_basis_is_nearer_to_the_fisher_matrix():
    """The theorem of George et al. (2018): nearer than Kronecker's own eigenvalues."""
    keras.config.set_floatx("float64")
    keras.utils.set_random_seed(1)
    model = keras.Sequential(
        [
            keras.Input((5, 5, 2)),
            keras.layers.Conv2D(3, 3, activation="relu"),
            keras.layers.Conv2D(2, 3, activation="relu"),
            keras.layers.Flatten(),
            keras.layers.Dense(3),
        ]
    )
    x = np.random.default_rng(0).normal(size=(40, 5, 5, 2))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    exact = keras_kfc.FisherOperator(model, x, loss=loss).to_dense()
    ends = np.cumsum([57, 56, 9])
    distances = {}
    for structure in ("kronecker", "eigenbasis", "diagonal"):
        found = keras_kfc.KroneckerFisherOperator(model, x, loss=loss, structure=structure)
        dense = found.to_dense()
        distances[structure] = [
            relative_error(dense[a:b, a:b], exact[a:b, a:b])
            for a, b in zip((0, *ends[:-1]), ends, strict=True)
        ]
        if structure == "eigenbasis":
            # The basis is orthonormal, so that the trace is the exact one.
            assert found.trace() == pytest.approx(np.trace(exact), rel=1e-5)
    for better, kronecker, diagonal in zip(*(distances[s] for s in (
        "eigenbasis", "kronecker", "diagonal")), strict=True):  # fmt: skip
        assert better < kronecker and better < diagonal
    assert distances["eigenbasis"][0] > 1e-3


def block_with_data(max_dim=None, damping=0.1):
    layer = keras_kfc.layers.Dense(3)
    layer.build((None, 4))
    optimizer = keras_kfc.KFC(structure="eigenbasis", damping=damping, max_factor_dim=max_dim)
    optimizer.build([layer.kernel, layer.bias])
    (block,) = optimizer.blocks
    rng = np.random.default_rng(0)
    x, ds = (rng.normal(size=(20, n)).astype("float32") for n in (4, 3))

    def update():
        moments = (
            *block.measured.from_inputs([tf.constant(x)], tf.constant(20), [None]),
            *block.measured.from_pass([tf.constant(x)], [tf.constant(ds)], tf.constant(20), [None]),
        )
        move_averages([block], [moments], tf.constant(20.0), tf.constant(0.0), tf.constant(True))

    return optimizer, block, update, np.append(x, np.ones((20, 1)), 1), ds


def test_a_direction_solves_the_explicit_system():
    optimizer, block, update, rows, ds = block_with_data()
    update()
    optimizer.parts.measuring.refresh_inverses()
    update()
    optimizer.parts.measuring.refresh_inverses()
    omega, gamma = rows.T @ rows / 20, ds.T @ ds / 20
    left, right = np.linalg.eigh(omega)[1], np.linalg.eigh(gamma)[1]
    moments = np.mean(
        [(left.T @ np.outer(a, d) @ right) ** 2 for a, d in zip(rows, ds, strict=True)], axis=0
    )
    weights = np.random.default_rng(1).normal(size=(5, 3))
    damped = moments + 0.1 * moments.mean()
    expected = left @ ((left.T @ weights @ right) / damped) @ right.T
    found = block.multiply(tf.constant(weights[None], tf.float32)).numpy()[0]
    assert relative_error(found, expected) < 1e-4
    kronecker = np.outer(np.linalg.eigvalsh(omega), np.linalg.eigvalsh(gamma))
    damped = kronecker + 0.1 * kronecker.mean()
    other = left @ ((left.T @ weights @ right) / damped) @ right.T
    assert relative_error(found, other) > 1e-2  # negative control: not Kronecker's eigenvalues


@pytest.mark.slow
def test_before_second_moments_are_known_they_are_those_of_the_factors():
    optimizer, block, update, rows, ds = block_with_data()
    update()
    optimizer.parts.measuring.refresh_inverses()
    expected = np.outer(*(np.linalg.eigvalsh(part.T @ part / 20) for part in (rows, ds)))
    assert relative_error(block.state["squares"].numpy()[0], expected) < 1e-4


@pytest.mark.slow
def test_a_side_beyond_the_limit_keeps_the_basis_of_the_weights():
    optimizer, block, update, rows, ds = block_with_data(max_dim=4)
    assert set(block.layout.factor_shapes) == {"gamma", "squares"}
    update()
    optimizer.parts.measuring.refresh_inverses()
    update()
    right = np.linalg.eigh(ds.T @ ds / 20)[1]
    expected = np.mean(
        [(np.outer(a, d) @ right) ** 2 for a, d in zip(rows, ds, strict=True)], axis=0
    )
    assert relative_error(block.state["squares"].numpy()[0], expected) < 1e-4
