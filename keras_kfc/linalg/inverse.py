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
    shape = (matrix.shape[0], size) if xla else (None, None)
    function = _damped_inverse(*shape, _halvings(size, largest), matrix.dtype, xla)
    return tf.ensure_shape(function(matrix, shift), matrix.shape)


@functools.lru_cache(maxsize=256)
def _damped_inverse(
    count: int | None, size: int | None, halvings: int, dtype: tf.DType, xla: bool
) -> Any:
    """The graph function behind `damped_inverse`.

    One for all shapes where it can be: tracing it takes longer than inverting most factors.
    XLA needs to know shapes.
    """
    smallest = dtype.as_numpy_dtype(10 * resolution(dtype))

    def invert(matrix: tf.Tensor, shift: tf.Tensor) -> tf.Tensor:
        diagonal = tf.linalg.diag_part(matrix)
        trace = tf.reduce_sum(diagonal, axis=1)
        shift = tf.maximum(shift, smallest * trace)
        # Work on a matrix of unit mean diagonal, so that no scale over- or underflows.
        rows = tf.cast(tf.shape(matrix)[-1], dtype) if size is None else size
        scale = trace / rows + shift
        usable = tf.math.is_finite(scale) & (scale > 0)
        usable &= tf.reduce_all(tf.math.is_finite(matrix), axis=(1, 2))
        # One number for each row, and for each matrix. What is not usable becomes the identity.
        of_rows, of_matrices = tf.constant((-1, 1)), tf.constant((-1, 1, 1))
        scale = tf.where(usable, scale, 1.0)
        diagonal = tf.where(tf.reshape(usable, of_rows), diagonal + tf.reshape(shift, of_rows), 1.0)
        usable, scale = tf.reshape(usable, of_matrices), tf.reshape(scale, of_matrices)
        damped = tf.linalg.set_diag(tf.where(usable, matrix, 0.0), diagonal) / scale

        def by_cholesky() -> tf.Tensor:
            # Small products gain less than their parts cost, and a third halving hardly anything.
            return _gram(inverse_root(damped, halvings), min(max(halvings - 1, 0), 2))

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


def _gram(root: tf.Tensor, halvings: int) -> tf.Tensor:
    """`Wᵀ W` for lower triangular `W`, `(G, n, n)`, without the products of its zeros.

    With `W = [[U, 0], [C, V]]` it is `[[Uᵀ U + Cᵀ C, Cᵀ V], [Vᵀ C, Vᵀ V]]`: half of the
    multiplications with one halving, three eighths with two, and a third at most.
    """
    if not halvings:
        return tf.matmul(root, root, transpose_a=True)
    half = (tf.shape(root)[-1] if root.shape[-1] is None else root.shape[-1]) // 2
    first = tf.slice(root, (0, 0, 0), (-1, half, half))
    below = tf.slice(root, (0, half, 0), (-1, -1, half))
    second = tf.slice(root, (0, half, half), (-1, -1, -1))
    upper = _gram(first, halvings - 1) + tf.matmul(below, below, transpose_a=True)
    corner = tf.matmul(second, below, transpose_a=True)
    lower = tf.concat((corner, _gram(second, halvings - 1)), axis=2)
    upper = tf.concat((upper, tf.linalg.matrix_transpose(corner)), axis=2)
    return tf.concat((upper, lower), axis=1)


def _halvings(size: int, largest: int) -> int:
    """How often matrices are halved until none has more than `largest + 1` rows."""
    halvings = 0
    while size >> halvings > largest:
        halvings += 1
    return halvings


def inverse_root(matrix: tf.Tensor, halvings: int = 0) -> tf.Tensor:
    """The lower triangular `W` with `Wᵀ W = A⁻¹`, for symmetric positive definite `A`.

    It is the inverse of the Cholesky factor, built from those of the two diagonal
    halves, so that nearly all of the work is in large products: with
    `A = [[P, Qᵀ], [Q, R]]`, `U` the root of P, `T = Q Uᵀ` and `V` the root of the Schur
    complement `R - T Tᵀ`, it is `[[U, 0], [-V T U, V]]`.

    Args:
        matrix: `(G, n, n)`.
        halvings: How often it is halved, before what is left is decomposed by one kernel.

    Returns:
        `(G, n, n)`; NaN where a pivot is not positive.
    """
    if not halvings:
        shape = matrix.shape if matrix.shape.is_fully_defined() else tf.shape(matrix)
        identity = tf.eye(shape[-1], batch_shape=shape[:1], dtype=matrix.dtype)
        return tf.linalg.triangular_solve(tf.linalg.cholesky(matrix), identity)
    size = tf.shape(matrix)[-1] if matrix.shape[-1] is None else matrix.shape[-1]
    half = size // 2
    dynamic = matrix.shape[-1] is None
    of_half = (
        _root_of_any_size(halvings - 1, matrix.dtype)
        if dynamic
        else functools.partial(inverse_root, halvings=halvings - 1)
    )
    first = of_half(tf.slice(matrix, (0, 0, 0), (-1, half, half)))
    below = tf.slice(matrix, (0, half, 0), (-1, -1, half))
    coupling = tf.matmul(below, first, transpose_b=True)
    complement = tf.slice(matrix, (0, half, half), (-1, -1, -1))
    second = complement - tf.matmul(coupling, coupling, transpose_b=True)
    second = of_half(second)
    corner = -second @ (coupling @ first)
    upper = tf.pad(first, ((0, 0), (0, 0), (0, size - half)))
    return tf.concat((upper, tf.concat((corner, second), axis=2)), axis=1)


@functools.lru_cache(maxsize=64)
def _root_of_any_size(halvings: int, dtype: tf.DType) -> Any:
    """`inverse_root` as a graph function, so that each level is traced once."""
    signature = [tf.TensorSpec((None, None, None), dtype)]
    root = functools.partial(inverse_root, halvings=halvings)
    return tf.function(root, input_signature=signature, autograph=False)
