"""Damped inverses of Kronecker factors.

Shape convention: a factor is a stack of G symmetric positive semi-definite
matrices, `(G, n, n)`; a *block* is a pair (omega, gamma) that stands for
`omega ⊗ gamma`, as `keras_kfc.maps.api` defines it. Everything here is a pure
function of tensors, and no matrix, singular or zero, raises.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from keras_kfc._compat.tensorflow_internals import compiled_by_xla, products_are_exact


class BlockShape(NamedTuple):
    """Sizes of a block, whatever parts its factors are cut into and filled up to.

    Args:
        groups: G.
        rows: Rows of the joint matrix of each group, n.
        columns: Its columns, m.
    """

    groups: int
    rows: int
    columns: int


def traces(factor: tf.Tensor, groups: int) -> tf.Tensor:
    """Trace of the factor of each group, `(G * P, n, n)` to `(G,)`."""
    parts = tf.linalg.trace(factor)
    if factor.shape[0] == groups:
        return parts
    return tf.reduce_sum(tf.reshape(parts, (groups, -1)), axis=1)


def block_damping(
    omega_mean: tf.Tensor,
    gamma_mean: tf.Tensor,
    damping: tf.Tensor,
    network_mean: tf.Tensor | None,
) -> tuple[tf.Tensor, tf.Tensor]:
    """Splits damping between the two factors of blocks (factored Tikhonov).

    With `λ` added to the eigenvalues of `omega ⊗ gamma`, the factors get
    `π √λ` and `√λ / π`, where `π² = (tr omega / n) / (tr gamma / m)`:
    Martens & Grosse (2015), section 6.3.

    Args:
        omega_mean: Mean eigenvalue of the omega of each block, `tr omega / n`, an entry for
            each group of a block with groups.
        gamma_mean: That of its gamma, `tr gamma / m`, likewise.
        damping: Scalar, at least 0. The paper's absolute `λ`, if
            `network_mean` is None; otherwise a multiple of the block's own
            mean eigenvalue `(tr omega / n)(tr gamma / m)`, so that scaling
            either factor scales its damping with it.
        network_mean: Mean eigenvalue of the whole network's Fisher matrix, a
            scalar. It stands in for a block whose own mean eigenvalue is zero
            (a dead layer) when damping is relative.

    Returns:
        `(omega_shift, gamma_shift)`, likewise: what to add to the diagonals. Where a trace is
        zero and damping is absolute, `π = 1`.
    """
    root = tf.sqrt(tf.cast(damping, omega_mean.dtype))
    omega_alive, gamma_alive = omega_mean > 0, gamma_mean > 0
    if network_mean is None:
        alive = omega_alive & gamma_alive
        ratio = tf.where(alive, omega_mean, 1.0) / tf.where(alive, gamma_mean, 1.0)
        pi = tf.sqrt(ratio)
        return pi * root, root / pi
    network_mean = tf.cast(network_mean, omega_mean.dtype)
    instead = tf.where(gamma_alive, tf.math.divide_no_nan(network_mean, gamma_mean), 1.0)
    omega_mean = tf.where(omega_alive, omega_mean, instead)
    gamma_mean = tf.where(gamma_alive, gamma_mean, network_mean / omega_mean)
    return root * omega_mean, root * gamma_mean


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
    resolution = _resolution(dtype)

    def invert(matrix, shift):
        diagonal = tf.linalg.diag_part(matrix)
        trace = tf.reduce_sum(diagonal, axis=1)
        shift = tf.maximum(shift, dtype.as_numpy_dtype(10 * resolution) * trace)
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

        def by_cholesky():
            root = inverse_root(damped, largest)
            return tf.matmul(root, root, transpose_a=True)

        def by_lu():
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
    def identity(size):
        return tf.eye(size, batch_shape=count, dtype=matrix.dtype)

    def root_of(matrix):
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


def invert_blocks(
    omegas: Sequence[tf.Tensor],
    gammas: Sequence[tf.Tensor],
    shapes: Sequence[BlockShape],
    damping: tf.Tensor,
    relative: bool,
) -> tuple[list[tf.Tensor], list[tf.Tensor]]:
    """Damped inverses of both factors of all blocks of a network.

    Compiled by XLA where a GPU is present, or where the caller is; on a CPU TensorFlow's
    own kernels compute the same faster. Factors of one size are inverted as one stack.

    Args:
        omegas: Input factors, each `(G * P, n, n)`.
        gammas: Output factors, each `(G * Q, m, m)`.
        shapes: Sizes of each block.
        damping: Scalar; see `block_damping`.
        relative: Whether damping is relative to the curvature.

    Returns:
        Inverses of the damped omegas and gammas, in the given order. Those that
        could not be computed hold NaN.
    """
    compiled = bool(tf.config.list_logical_devices("GPU"))
    function = _invert_all_xla if compiled else _invert_all
    return function(list(omegas), list(gammas), tuple(shapes), damping, relative)


def _invert_all(omegas, gammas, block_shapes, damping, relative):
    factors = [*omegas, *gammas]
    factor_shifts = _shifts(omegas, gammas, block_shapes, damping, relative)
    inverses: list[Any] = [None] * len(factors)
    for members in _equal_shapes(factors).values():
        stack = _concat([factors[number] for number in members])
        shift = _concat([factor_shifts[number] for number in members])
        parts = [damped_inverse(stack, shift)]
        if len(members) > 1:
            parts = tf.split(parts[0], [factors[number].shape[0] for number in members])
        for number, part in zip(members, parts, strict=True):
            inverses[number] = part
    return inverses[: len(omegas)], inverses[len(omegas) :]


_invert_all_xla = tf.function(_invert_all, autograph=False, jit_compile=True)


def _equal_shapes(factors):
    """Positions of the factors of each size and dtype."""
    positions: dict[Any, list[int]] = {}
    for number, factor in enumerate(factors):
        positions.setdefault((factor.shape[-1], factor.dtype), []).append(number)
    return positions


def _shifts(omegas, gammas, block_shapes, damping, relative):
    """What to add to the diagonals of all omegas, then of all gammas, a list of `(G * P,)`.

    Parts of a factor that was cut into diagonal blocks get the same.
    """
    # All blocks at once. Numbers of float64 blocks keep their precision.
    dtype = max((factor.dtype for factor in omegas), key=lambda dtype: dtype.size)
    groups = [shape.groups for shape in block_shapes]

    def traces_of(factors):
        parts = zip(factors, groups, strict=True)
        return _concat([tf.cast(traces(factor, count), dtype) for factor, count in parts])

    rows = np.repeat([shape.rows for shape in block_shapes], groups)
    columns = np.repeat([shape.columns for shape in block_shapes], groups)
    omega_traces, gamma_traces = traces_of(omegas), traces_of(gammas)
    network_mean = None
    if relative:
        # Trace of the block-diagonal Fisher matrix over the number of parameters.
        network_mean = tf.tensordot(omega_traces, gamma_traces, 1) / float(rows @ columns)
    shifts = block_damping(
        omega_traces / rows.astype(dtype.as_numpy_dtype),
        gamma_traces / columns.astype(dtype.as_numpy_dtype),
        damping,
        network_mean,
    )
    all_shifts = []
    for factors, shift in zip((omegas, gammas), shifts, strict=True):
        for factor, part in zip(factors, tf.split(shift, groups), strict=True):
            repeats = factor.shape[0] // part.shape[0]
            part = tf.repeat(part, repeats) if repeats > 1 else part
            all_shifts.append(tf.cast(part, factor.dtype))
    return all_shifts


def _concat(tensors):
    return tf.concat(tensors, axis=0) if len(tensors) > 1 else tensors[0]


def _resolution(dtype: tf.DType) -> float:
    return 2.0**-52 if dtype == tf.float64 else 2.0**-23
