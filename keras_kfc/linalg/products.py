"""Sums over the rows of matrices, as products of matrices."""

import tensorflow as tf


def gram(rows: tf.Tensor) -> tf.Tensor:
    """Sums of outer products `Σ_r r rᵀ`: `(G, N, n)` to `(G, n, n)`."""
    if rows.shape[0] == 1:  # one matrix is multiplied faster than a batch of one
        matrix = tf.squeeze(rows, axis=0)
        return tf.expand_dims(tf.matmul(matrix, matrix, transpose_a=True), 0)
    return tf.matmul(rows, rows, transpose_a=True)


def sum_of_rows(rows: tf.Tensor) -> tf.Tensor:
    """Sum over the last axis but one."""
    return tf.reduce_sum(rows, axis=-2)
