"""Many tensors as one, so that one exchange between replicas serves for all.

Symmetric matrices are sent as their upper triangles.
"""

from collections.abc import Sequence

import tensorflow as tf


def upper_triangles(matrices: tf.Tensor) -> tf.Tensor:
    """The upper triangles of symmetric matrices, `(G, n, n)`, as rows, `(G, n (n + 1) / 2)`.

    Of the triangle below the first row, turned by half a round, the empty half takes up the
    full one, so that no index is needed.
    """
    count, size = matrices.shape[0], matrices.shape[-1]
    upper = tf.linalg.band_part(matrices, 0, -1)
    first, others = upper[:, 0], upper[:, 1:]
    # One of the two summands is zero.
    both = tf.reshape(others + tf.reverse(others, (1, 2)), (count, size * (size - 1)))
    return tf.concat((first, both[:, : size * (size - 1) // 2]), axis=1)


def from_upper_triangles(rows: tf.Tensor, size: int) -> tf.Tensor:
    """The symmetric matrices, `(G, n, n)`, that `upper_triangles` made rows of."""
    mirrored = tf.concat((rows, tf.reverse(rows[:, size:], (1,))), axis=1)
    upper = tf.linalg.band_part(tf.reshape(mirrored, (rows.shape[0], size, size)), 0, -1)
    strict = tf.linalg.set_diag(upper, tf.zeros_like(upper[:, 0]))
    return upper + tf.linalg.matrix_transpose(strict)


def pack(tensors: Sequence[tf.Tensor], symmetric: Sequence[bool]) -> tf.Tensor:
    """Tensors of one dtype as a vector.

    Args:
        tensors: The tensors, of known shapes.
        symmetric: Which of them are stacks of symmetric matrices, `(G, n, n)`.
    """
    parts = [
        upper_triangles(tensor) if triangular else tensor
        for tensor, triangular in zip(tensors, symmetric, strict=True)
    ]
    return tf.concat([tf.reshape(part, (-1,)) for part in parts], axis=0)


def unpack(
    vector: tf.Tensor, shapes: Sequence[tuple[int, ...]], symmetric: Sequence[bool]
) -> list[tf.Tensor]:
    """The tensors, of these shapes, that `pack` made a vector of."""
    packed = [
        (shape[0], shape[-1] * (shape[-1] + 1) // 2) if triangular else shape
        for shape, triangular in zip(shapes, symmetric, strict=True)
    ]
    sizes = [tf.TensorShape(shape).num_elements() for shape in packed]
    parts = [
        tf.reshape(part, shape) for part, shape in zip(tf.split(vector, sizes), packed, strict=True)
    ]
    return [
        from_upper_triangles(part, shape[-1]) if triangular else part
        for part, shape, triangular in zip(parts, shapes, symmetric, strict=True)
    ]
