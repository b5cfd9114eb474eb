"""Many tensors as one, so that one exchange between replicas serves for all.

Symmetric matrices are sent as their upper triangles.
"""

from collections.abc import Sequence

import numpy as np
import tensorflow as tf

# Rows of a matrix from which it is packed in quarters: transposing a small part of a large matrix
# takes a third of the time of transposing all of it, since processors keep it at hand.
_LARGEST_WHOLE = 256


def upper_triangles(matrices: tf.Tensor) -> tf.Tensor:
    """The upper triangles of symmetric matrices, `(G, n, n)`, as rows, `(G, n (n + 1) / 2)`.

    Of a large matrix the two quarters on the diagonal, each like a matrix, and the upper right
    quarter between them. Of a small one the first row, and then the triangle below it: its lower
    half, turned by half a round, fills the empty places of its upper half, so that no entry is
    looked up by an index.
    """
    count, size = matrices.shape[0], matrices.shape[-1]
    half = size // 2
    if size > _LARGEST_WHOLE:
        first = upper_triangles(tf.slice(matrices, (0, 0, 0), (-1, half, half)))
        corner = tf.reshape(tf.slice(matrices, (0, 0, half), (-1, half, -1)), (count, -1))
        second = upper_triangles(tf.slice(matrices, (0, half, half), (-1, -1, -1)))
        return tf.concat((first, corner, second), axis=1)
    above = tf.slice(matrices, (0, 1, 0), (-1, half, -1)) if half else matrices[:, :0]
    below = tf.reverse(tf.slice(matrices, (0, size - half, 0), (-1, half, -1)), (1, 2))
    full = np.triu(np.ones((half, size), bool), 1)
    joined = tf.reshape(tf.where(full, above, below), (count, half * size))
    return tf.concat((matrices[:, 0], joined[:, : size * (size - 1) // 2]), axis=1)


def from_upper_triangles(rows: tf.Tensor, size: int) -> tf.Tensor:
    """The symmetric matrices, `(G, n, n)`, that `upper_triangles` made rows of."""
    if size > _LARGEST_WHOLE:
        half, rest = size // 2, size - size // 2
        lengths = (half * (half + 1) // 2, half * rest, rest * (rest + 1) // 2)
        first, corner, second = tf.split(rows, lengths, axis=1)
        corner = tf.reshape(corner, (-1, half, rest))
        above = (from_upper_triangles(first, half), corner)
        below = (tf.linalg.matrix_transpose(corner), from_upper_triangles(second, rest))
        return tf.concat((tf.concat(above, axis=2), tf.concat(below, axis=2)), axis=1)
    turned = tf.concat((rows, tf.reverse(rows[:, size:], (1,))), axis=1)
    square = tf.reshape(turned, (rows.shape[0], size, size))
    upper = np.triu(np.ones((size, size), bool))
    return tf.where(upper, square, tf.linalg.matrix_transpose(square))


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
