"""Factors that are the partial traces of a layer's Fisher block.

One example's derivative of the weights is `D = Σ_t ā_t Ds_tᵀ`, a sum over positions, and the
Fisher block is the mean of `vec(D) vec(D)ᵀ`, itself no Kronecker product. The setting "trace"
makes one of it that assumes nothing about inputs, derivatives or positions:

    omega  mean over examples of  D Dᵀ = Σ_ts (Ds_t · Ds_s) ā_t ā_sᵀ
    gamma  mean over examples of  Dᵀ D = Σ_ts (ā_t · ā_s) Ds_t Ds_sᵀ
    block  omega ⊗ gamma / tr,         tr = tr omega = tr gamma, the trace of the block

It is the block wherever that is a Kronecker product, has its trace and both its partial
traces always, and is the first step of the power iteration for the nearest product from the
identity on. An example counts for as much as its derivative is long: those that the network
has learnt count for nothing. (Gao et al. 2021, "A trace-restricted Kronecker-factored
approximation to natural gradient", take the trace; Morwani et al. 2024, "A new perspective on
Shampoo's preconditioner", the iteration.)

The positions of one use of a layer may be correlated in any way. Several uses are taken to be
uncorrelated, and so are the rows of a use without an axis of positions.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
import tensorflow as tf

from keras_kfc.linalg.products import matmul
from keras_kfc.maps.api import LinearMap, dimension, masked, pad_and_split_columns
from keras_kfc.maps.sharing import split_channels

# Two matrices of rows, `(G, rows, n)`, the sum of whose products is a factor.
_Rows = tuple[tf.Tensor, tf.Tensor]
_Split = Callable[[tf.Tensor], tf.Tensor]


def partial_traces(
    linear_map: LinearMap,
    inputs: Sequence[tf.Tensor],
    derivatives: Sequence[tf.Tensor],
    batch_size: tf.Tensor,
    use_bias: bool,
    parts: tuple[int, int],
    masks: Sequence[tf.Tensor | None],
) -> tuple[tf.Tensor, tf.Tensor]:
    """Omega and gamma of one batch and one backward pass.

    Args:
        linear_map: The layer's weights as a linear map.
        inputs: What the layer saw, a tensor for each use.
        derivatives: `Ds` for each use, of one example's loss.
        batch_size: Number of examples B, a scalar.
        use_bias: Whether the weights have a row for the bias.
        parts: Number of diagonal blocks of each group's omega, P, and gamma, Q.
        masks: For each use, which positions count, or None for all.

    Returns:
        `(G * P, R, R)` and `(G * Q, t, t)` as in `keras_kfc.curvature.layout`, at least float32.
    """

    def split_rows(rows: tf.Tensor) -> tf.Tensor:
        return _split_rows(linear_map, rows, parts[0])

    def split_columns(columns: tf.Tensor) -> tf.Tensor:
        return pad_and_split_columns(columns, parts[1])

    omegas, gammas = [], []
    for tensor, ds, mask in zip(inputs, derivatives, masks, strict=True):
        rows = linear_map.input_rows(masked(tensor, mask))
        if use_bias:
            # A position that does not count has no derivative, so that its one does not either.
            rows = tf.concat((rows, tf.ones_like(rows[..., :1])), axis=2)
        columns = linear_map.derivative_rows(masked(ds, mask))
        positions = _positions(ds, linear_map.outputs)
        omega, gamma = _traces_of_use(rows, columns, positions, split_rows, split_columns)
        omegas.append(omega)
        gammas.append(gamma)
    omega, gamma = tf.add_n(omegas), tf.add_n(gammas)
    examples = tf.cast(batch_size, omega.dtype)
    return omega / examples, gamma / examples


def pairs_are_cheaper(positions: int | tf.Tensor, inputs: int, outputs: int) -> bool | tf.Tensor:
    """Whether products of all pairs of an example's positions take less than its derivative `D`.

    Args:
        positions: Number of positions of an example.
        inputs: Rows of the weights with bias of each group, n.
        outputs: Its columns, m.
    """
    together = inputs + outputs
    squares = inputs * inputs + outputs * outputs
    by_pairs = positions * (2 * positions * together + squares)
    return by_pairs < inputs * outputs * (positions + together)


def _positions(derivatives: tf.Tensor, outputs: int) -> int | tf.Tensor:
    """Number of positions of each example; 1 where there is no axis of them."""
    own = derivatives.shape[1:]
    if own.is_fully_defined():
        return math.prod(own) // outputs
    axes = range(1, len(derivatives.shape))
    return tf.reduce_prod([dimension(derivatives, axis) for axis in axes]) // outputs


def _traces_of_use(
    rows: tf.Tensor,
    columns: tf.Tensor,
    positions: int | tf.Tensor,
    split_rows: _Split,
    split_columns: _Split,
) -> tuple[tf.Tensor, tf.Tensor]:
    """Sums over the examples of one use, in the cheapest of three ways.

    Args:
        rows: `ā`, `(G, B * positions, n)`.
        columns: `Ds`, `(G, B * positions, m)`.
        positions: Number of positions of each example.
        split_rows: Cuts rows of n numbers into parts.
        split_columns: Cuts rows of m numbers.
    """

    def multiplied(way: Callable[..., tuple[_Rows, _Rows]]) -> tuple[tf.Tensor, tf.Tensor]:
        for_omega, for_gamma = way(rows, columns, positions)
        return _products(for_omega, split_rows), _products(for_gamma, split_columns)

    if isinstance(positions, int) and positions == 1:
        return multiplied(_of_single_positions)
    by_pairs = pairs_are_cheaper(positions, rows.shape[2], columns.shape[2])
    if isinstance(by_pairs, bool):
        return multiplied(_of_pairs if by_pairs else _of_examples)
    return tf.cond(by_pairs, lambda: multiplied(_of_pairs), lambda: multiplied(_of_examples))


def _products(pair: _Rows, split: _Split) -> tf.Tensor:
    """`Σ_r x_r y_rᵀ` of rows that are cut into parts, which is symmetric."""
    first, second = pair
    cut = split(first)
    other = cut if second is first else split(second)
    return matmul(cut, other, transpose_a=True)


def _of_single_positions(
    rows: tf.Tensor, columns: tf.Tensor, positions: int | tf.Tensor
) -> tuple[_Rows, _Rows]:
    """Rows as long as the other side's are."""
    del positions
    longer = rows * tf.norm(columns, axis=2, keepdims=True)
    others = columns * tf.norm(rows, axis=2, keepdims=True)
    return (longer, longer), (others, others)


def _of_pairs(
    rows: tf.Tensor, columns: tf.Tensor, positions: int | tf.Tensor
) -> tuple[_Rows, _Rows]:
    """Rows, and their sums weighted by the products of the other side's for all positions."""

    def weighted(tensor: tf.Tensor, other: tf.Tensor) -> tf.Tensor:
        own, others = (_by_example(part, positions) for part in (tensor, other))
        sums = tf.matmul(tf.matmul(others, others, transpose_b=True), own)
        return tf.reshape(sums, tf.shape(tensor))

    return (rows, weighted(rows, columns)), (columns, weighted(columns, rows))


def _of_examples(
    rows: tf.Tensor, columns: tf.Tensor, positions: int | tf.Tensor
) -> tuple[_Rows, _Rows]:
    """The columns of each example's derivative, and its rows."""
    parts = (_by_example(part, positions) for part in (columns, rows))
    transposed = tf.matmul(*parts, transpose_a=True)
    groups, _, outputs, inputs = transposed.shape
    for_omega = tf.reshape(transposed, (groups, -1, inputs))
    derivative = tf.linalg.matrix_transpose(transposed)
    for_gamma = tf.reshape(derivative, (groups, -1, outputs))
    return (for_omega, for_omega), (for_gamma, for_gamma)


def _by_example(rows: tf.Tensor, positions: int | tf.Tensor) -> tf.Tensor:
    """`(G, B * positions, n)` as `(G, B, positions, n)`."""
    return tf.reshape(rows, (rows.shape[0], -1, positions, rows.shape[2]))


def _split_rows(linear_map: LinearMap, rows: tf.Tensor, parts: int) -> tf.Tensor:
    """Cuts the channels of rows into parts; the bias is in the first, and zero in the others."""
    if parts == 1:
        return rows
    kernel = split_channels(linear_map, rows[..., : linear_map.kernel_rows], parts)
    bias = rows[..., linear_map.kernel_rows :]
    first = (np.arange(parts) == 0).reshape(1, parts, 1, 1)
    bias = bias[:, None] * tf.constant(first, rows.dtype)
    return tf.concat((kernel, tf.reshape(bias, (*kernel.shape[:1], -1, bias.shape[3]))), axis=2)
