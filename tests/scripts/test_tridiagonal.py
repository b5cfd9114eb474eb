"""The inverses that `benchmarks.tridiagonal` compares, against explicit matrices."""

import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf

from benchmarks.chains import BlockDiagonal, BlockTridiagonal, Factors
from benchmarks.tridiagonal import Chain, curve

# Inputs with a one, and outputs, of each layer.
SIZES = ((3, 4), (5, 2), (3, 3))


def factors(seed: int = 0) -> Factors:
    """Factors of rows that have something in common from one layer to the next."""
    rng = np.random.default_rng(seed)
    common = rng.normal(size=(50, 3))
    inputs, outputs = (
        [common @ rng.normal(size=(3, pair[side])) + rng.normal(size=(50, pair[side]))
         for pair in SIZES]
        for side in (0, 1)
    )  # fmt: skip
    return Factors(
        [a.T @ a / 50 for a in inputs],
        [g.T @ g / 50 for g in outputs],
        [a.T @ b / 50 for a, b in itertools.pairwise(inputs)],
        [a.T @ b / 50 for a, b in itertools.pairwise(outputs)],
    ).damped(0.1)


def explicit(inverse: object) -> np.ndarray:
    """The matrix of a linear function of lists of matrices, column by column."""
    shapes = [(n, m) for n, m in SIZES]
    ends = np.cumsum([n * m for n, m in shapes])
    columns = []
    for unit in np.eye(ends[-1]):
        parts = np.split(unit, ends[:-1])
        product = inverse.times([p.reshape(s) for p, s in zip(parts, shapes, strict=True)])
        columns.append(np.concatenate([part.ravel() for part in product]))
    return np.array(columns).T


def blocks_of(matrix: np.ndarray) -> list[list[np.ndarray]]:
    """Its blocks for each two layers."""
    ends = np.cumsum([n * m for n, m in SIZES])[:-1]
    return [np.split(rows, ends, axis=1) for rows in np.split(matrix, ends)]


def test_block_diagonal_inverse_is_that_of_kronecker_products():
    own = factors()
    blocks = blocks_of(explicit(BlockDiagonal(own)))
    for i in range(3):
        wanted = np.linalg.inv(np.kron(own.inputs[i], own.outputs[i]))
        np.testing.assert_allclose(blocks[i][i], wanted, rtol=1e-9, atol=1e-12)
    assert not blocks[0][1].any()


def test_tridiagonal_inverse_is_the_one_whose_matrix_has_the_given_blocks():
    # Section 4.3: F̂ agrees with F̃ on the three diagonals of blocks, and its inverse has no others.
    own = factors()
    inverse = explicit(BlockTridiagonal(own))
    np.testing.assert_allclose(inverse, inverse.T, rtol=1e-9, atol=1e-9)
    matrix = blocks_of(np.linalg.inv(inverse))
    for i in range(3):
        wanted = np.kron(own.inputs[i], own.outputs[i])
        np.testing.assert_allclose(matrix[i][i], wanted, rtol=1e-7, atol=1e-9)
    for i in range(2):
        wanted = np.kron(own.next_inputs[i], own.next_outputs[i])
        np.testing.assert_allclose(matrix[i][i + 1], wanted, rtol=1e-7, atol=1e-9)
        assert np.abs(wanted).max() > 0.05
    assert np.abs(blocks_of(inverse)[0][2]).max() < 1e-9 < np.abs(matrix[0][2]).max()


def test_exact_curvature_of_a_chain_is_that_of_an_explicit_jacobian():
    keras.utils.set_random_seed(3)
    hidden = [keras.layers.Dense(5, "tanh"), keras.layers.Dense(3)]
    chain = Chain(keras.Sequential([keras.Input((4,)), *hidden, keras.layers.Dense(4, "sigmoid")]))
    rng = np.random.default_rng(1)
    x = tf.constant(rng.uniform(size=(6, chain.weights[0].shape[0] - 1)).astype("float32"))
    pair = [
        [rng.normal(size=weights.shape).astype("float32") for weights in chain.weights]
        for _ in range(2)
    ]
    with tf.GradientTape() as tape:
        logits, _, _ = chain.outputs(x)
    jacobians = tape.jacobian(logits, chain.weights)
    moved = [
        sum(np.einsum("boij,ij->bo", j.numpy(), v) for j, v in zip(jacobians, own, strict=True))
        for own in pair
    ]
    p = tf.sigmoid(logits).numpy()
    wanted = [[np.mean(np.sum(a * p * (1 - p) * b, axis=1)) for b in moved] for a in moved]
    np.testing.assert_allclose(chain.curvature(x, *pair), wanted, rtol=2e-4)


@pytest.mark.slow
@pytest.mark.parametrize("setting", ["block-diagonal", "block-tridiagonal", "KFC()"])
def test_every_setting_lowers_the_loss(setting):
    row = curve("digits", setting, 1, 500, [1, 12], 1.0)
    assert row["12"] < 0.75 * row["1"]
    assert row["seconds"] > 0
