"""Damped inverses of factors against NumPy's."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import few, inverses_of

from conftest import relative_error
from keras_kfc.linalg.damping import BlockShape
from keras_kfc.linalg.inverse import damped_inverse, inverse_root


@pytest.fixture(autouse=True)
def _float64():
    keras.config.set_floatx("float64")


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_inverse_never_raises(dtype):
    """Singular, zero, tiny, huge and broken matrices: numbers, or NaN, but no error."""
    rng = np.random.default_rng(0)
    finite = []
    for n in (1, 2, 17, 130):
        for rank in (1, 2, n // 2 + 1):
            for scale in (1e-30, 1e-8, 1.0, 1e12):
                root = rng.normal(size=(n, rank)) * np.sqrt(scale)
                finite.append(root @ root.T)
        finite += [np.ones((n, n)), np.diag(np.r_[np.zeros(n - 1), 1.0])]
    for matrix in finite:
        matrix = matrix.astype(dtype)
        inverse = damped_inverse(tf.constant(matrix[None]), tf.zeros((1,), dtype))[0].numpy()
        assert np.isfinite(inverse).all()
        assert (np.diag(inverse) > 0).all()
    for broken in (np.nan, np.inf):
        matrix = np.eye(4, dtype=dtype)
        matrix[1, 2] = broken
        inverse = damped_inverse(tf.constant(matrix[None]), tf.ones((1,), dtype))
        assert np.isnan(inverse).all()
    assert np.isnan(damped_inverse(tf.zeros((1, 3, 3), dtype), tf.zeros((1,), dtype))).all()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_nearly_singular_matrices_have_inverses(dtype):
    """Smooth kernels, whose eigenvalues fall below rounding, and two inputs almost equal."""
    resolution = float(np.finfo(dtype).eps)
    matrices = [np.array([[1, 1 + 25 * resolution], [1 + 25 * resolution, 1]])]
    for n in (5, 64, 130, 150, 300):
        grid = np.linspace(0, 1, n)
        matrices.append(np.exp(-((grid[:, None] - grid) ** 2) / 0.5))
        matrices.append(1 / (1 + np.arange(n)[:, None] + np.arange(n)))
        matrices.append(np.ones((n, n)))
    for matrix in matrices:
        for damping in (0.0, 10 * resolution, 1000 * resolution):
            shift = damping * len(matrix)
            inverse = damped_inverse(tf.constant(matrix[None], dtype), tf.constant([shift], dtype))
            assert np.isfinite(inverse).all(), (len(matrix), damping)


@pytest.mark.parametrize("jit_compile", [False, True])
@pytest.mark.parametrize("shift", [0.3, 1e-3])
@pytest.mark.parametrize("size", few([30, 300, 1, 64, 65, 129, 530], 2))
def test_damped_inverse_is_the_inverse(jit_compile, shift, size):
    """One block and several, with more and less damping."""
    root = np.random.default_rng(0).normal(size=(2, size, 2 * size)).astype("float32")
    matrix = tf.matmul(root, root, transpose_b=True) / (2 * size)
    shifts = tf.constant([shift, 2 * shift])
    result = tf.function(damped_inverse, jit_compile=jit_compile)(matrix, shifts)
    damped = matrix.numpy().astype("float64") + shifts.numpy()[:, None, None] * np.eye(size)
    expected = np.linalg.inv(damped)
    assert relative_error(result, expected) < 2e-5
    np.testing.assert_allclose(result, tf.linalg.matrix_transpose(result), rtol=1e-4, atol=1e-5)
    undamped = np.linalg.inv(damped - shifts.numpy()[:, None, None] * np.eye(size))
    assert relative_error(result, undamped) > 2e-4 or shift < 0.3


def test_a_large_matrix_has_its_inverse():
    """Cut so often that all is done in quarters, and with halves of different sizes."""
    root = np.random.default_rng(0).normal(size=(2, 531, 700))
    matrix = root @ root.transpose(0, 2, 1) / 700
    shifts = np.array([0.3, 0.6])
    result = damped_inverse(tf.constant(matrix), tf.constant(shifts))
    expected = np.linalg.inv(matrix + shifts[:, None, None] * np.eye(531))
    np.testing.assert_allclose(result, expected, atol=1e-12)


@pytest.mark.parametrize("halvings", [0, 1, 3])
def test_inverse_root_is_the_inverse_of_the_cholesky_factor(halvings):
    root = np.random.default_rng(0).normal(size=(2, 150, 300))
    matrix = root @ root.transpose(0, 2, 1)
    expected = np.linalg.inv(np.linalg.cholesky(matrix))
    np.testing.assert_allclose(inverse_root(tf.constant(matrix), halvings), expected, atol=1e-12)


def test_factors_of_one_size_are_inverted_as_each_alone():
    rng = np.random.default_rng(0)

    def factor(count, size):
        root = rng.normal(size=(count, size, 3 * size))
        return tf.constant(root @ root.transpose(0, 2, 1) * rng.uniform(0.1, 10))

    # Sizes recur among omegas, among gammas and between the two, with groups too.
    omegas = [factor(1, 5), factor(1, 4), factor(2, 5), factor(1, 5)]
    gammas = [factor(1, 4), factor(1, 5), factor(2, 4), factor(1, 3)]
    shapes = [
        BlockShape(omega.shape[0], omega.shape[1], gamma.shape[1])
        for omega, gamma in zip(omegas, gammas, strict=True)
    ]
    results = inverses_of(omegas, gammas, shapes, 0.2, False)
    compiled = tf.function(inverses_of, jit_compile=True)(omegas, gammas, shapes, 0.2, False)
    flat, flat_compiled = tf.nest.flatten(results), tf.nest.flatten(compiled)
    for one, other in zip(flat, flat_compiled, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-10)
    for number, (omega, gamma) in enumerate(zip(omegas, gammas, strict=True)):
        # The paper's π for each group.
        means = [np.trace(part, axis1=1, axis2=2) / part.shape[-1] for part in (omega, gamma)]
        pi = np.sqrt(means[0] / means[1])
        shifts = np.sqrt(0.2) * pi, np.sqrt(0.2) / pi
        for result, matrix, shift in zip(results, (omega, gamma), shifts, strict=True):
            identity = np.eye(matrix.shape[-1])
            expected = np.linalg.inv(matrix + shift[:, None, None] * identity)
            np.testing.assert_allclose(result[number], expected, rtol=1e-8, atol=1e-12)
