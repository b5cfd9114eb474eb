"""Products of stacks of matrices, and sums over their rows."""

import tensorflow as tf


def matmul(
    first: tf.Tensor, second: tf.Tensor, transpose_a: bool = False, transpose_b: bool = False
) -> tf.Tensor:
    """`tf.matmul` of stacks, `(G, ., .)`; one matrix is multiplied faster than a stack of one."""
    transposed = {"transpose_a": transpose_a, "transpose_b": transpose_b}
    if first.shape[0] == second.shape[0] == 1:
        pair = (tf.squeeze(part, axis=0) for part in (first, second))
        return tf.expand_dims(tf.matmul(*pair, **transposed), 0)
    return tf.matmul(first, second, **transposed)


def gram(rows: tf.Tensor) -> tf.Tensor:
    """Sums of outer products `Σ_r r rᵀ`: `(G, N, n)` to `(G, n, n)`."""
    return matmul(rows, rows, transpose_a=True)


def sum_of_rows(rows: tf.Tensor) -> tf.Tensor:
    """Sum over the last axis but one."""
    return tf.reduce_sum(rows, axis=-2)
