"""Damped inverses of Kronecker factors.

Shape convention: a factor is a stack of G symmetric positive semi-definite
matrices, `(G, n, n)`. Everything here is a pure function of tensors, and no matrix,
singular or zero, raises.
"""

import functools
from typing import Any

import tensorflow as tf

from keras_kfc._compat.tensorflow_internals import compiled_by_xla, products_are_exact
from keras_kfc.linalg.precision import resolution


def damped_inverse(matrix: tf.Tensor, shift: tf.Tensor) -> tf.Tensor:
    """Inverts `A + shift I` for a stack of symmetric positive semi-definite `A`.

    The shift is raised to `10 ε tr(A)`, ε being the resolution of the dtype,
    where it is below: less cannot be told from rounding errors in `A`. A
    matrix that holds a NaN or an infinity yields NaN, and so does a zero
    matrix with zero shift.

    By Cholesky decomposition in blocks (`inverse_root`), and by LU decomposition where that
    meets a negative pivot, which takes less damping than rounding errors of `A` can
    bear. Under XLA there is no second try: the inverse is NaN then.

    Args:
        matrix: `(G, n, n)`.
        shift: `(G,)`, not negative.

    Returns:
        The symmetric inverses, `(G, n, n)`.
    """
    shift = tf.cast(shift, matrix.dtype)
    size, xla = matrix.shape[-1], compiled_by_xla()
    # Above this size a decomposition in blocks is faster than one kernel, but not to be had
    # from rounded products.
    largest = (64 if xla else 128) if products_are_exact() else size
    function = _damped_inverse_of_shape(matrix.shape[0], size, matrix.dtype, xla, largest)
    return tf.ensure_shape(function(matrix, shift), matrix.shape)


@functools.lru_cache(maxsize=256)
def _damped_inverse_of_shape(
    count: int | None, size: int, dtype: tf.DType, xla: bool, largest: int
) -> Any:
    """The graph function behind `damped_inverse`, traced once for each shape."""
    smallest = dtype.as_numpy_dtype(10 * resolution(dtype))

    def invert(matrix: tf.Tensor, shift: tf.Tensor) -> tf.Tensor:
        diagonal = tf.linalg.diag_part(matrix)
        trace = tf.reduce_sum(diagonal, axis=1)
        shift = tf.maximum(shift, smallest * trace)
        # Work on a matrix of unit mean diagonal, so that no scale over- or underflows.
        scale = trace / size + shift
        usable = tf.math.is_finite(scale) & (scale > 0)
        usable &= tf.reduce_all(tf.math.is_finite(matrix), axis=(1, 2))
        # One number for each row, and for each matrix. What is not usable becomes the identity.
        of_rows, of_matrices = tf.constant((-1, 1)), tf.constant((-1, 1, 1))
        scale = tf.where(usable, scale, 1.0)
        diagonal = tf.where(tf.reshape(usable, of_rows), diagonal + tf.reshape(shift, of_rows), 1.0)
        usable, scale = tf.reshape(usable, of_matrices), tf.reshape(scale, of_matrices)
        damped = tf.linalg.set_diag(tf.where(usable, matrix, 0.0), diagonal) / scale

        def by_cholesky() -> tf.Tensor:
            root = inverse_root(damped, largest)
            return tf.matmul(root, root, transpose_a=True)

        def by_lu() -> tf.Tensor:
            inverse = tf.linalg.inv(damped)
            return 0.5 * (inverse + tf.linalg.matrix_transpose(inverse))

        inverse = by_cholesky()
        if not xla:
            # Rounding made a pivot negative.
            found = tf.reduce_all(tf.math.is_finite(inverse))
            inverse = tf.cond(found, lambda: inverse, by_lu)
        return tf.where(usable, inverse / scale, dtype.as_numpy_dtype("nan"))

    signature = [tf.TensorSpec((count, size, size), dtype), tf.TensorSpec((count,), dtype)]
    return tf.function(invert, input_signature=signature, autograph=False)


def inverse_root(matrix: tf.Tensor, largest: int = 64) -> tf.Tensor:
    """The lower triangular `W` with `Wᵀ W = A⁻¹`, for symmetric positive definite `A`.

    It is the inverse of the Cholesky factor, built from those of the two diagonal
    halves, so that nearly all of the work is in large products: with
    `A = [[P, Qᵀ], [Q, R]]`, `U` the root of P, `T = Q Uᵀ` and `V` the root of the Schur
    complement `R - T Tᵀ`, it is `[[U, 0], [-V T U, V]]`.

    Args:
        matrix: `(G, n, n)`.
        largest: Size up to which a matrix is decomposed as a whole, by one kernel.

    Returns:
        `(G, n, n)`; NaN where a pivot is not positive.
    """
    count = tf.shape(matrix)[:1] if matrix.shape[0] is None else matrix.shape[:1]

    @functools.cache
    def identity(size: int) -> tf.Tensor:
        return tf.eye(size, batch_shape=count, dtype=matrix.dtype)

    def root_of(matrix: tf.Tensor) -> tf.Tensor:
        size = matrix.shape[-1]
        if size <= largest:
            return tf.linalg.triangular_solve(tf.linalg.cholesky(matrix), identity(size))
        half = size // 2
        first = root_of(tf.slice(matrix, (0, 0, 0), (-1, half, half)))
        below = tf.slice(matrix, (0, half, 0), (-1, -1, half))
        coupling = tf.matmul(below, first, transpose_b=True)
        complement = tf.slice(matrix, (0, half, half), (-1, -1, -1))
        second = root_of(complement - tf.matmul(coupling, coupling, transpose_b=True))
        corner = -second @ (coupling @ first)
        upper = tf.pad(first, ((0, 0), (0, 0), (0, size - half)))
        return tf.concat((upper, tf.concat((corner, second), axis=2)), axis=1)

    return root_of(matrix)
