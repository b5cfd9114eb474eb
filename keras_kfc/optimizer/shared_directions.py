"""Preconditioning shared out among replicas: each takes some blocks, and all exchange theirs.

Of the three ways of KAISA ([Pauloski et al. 2021](https://arxiv.org/abs/2107.01739)) to place the
work this is the one with the fewest products on each worker, except that inverses are exchanged,
too: all replicas have the same state after every step.
"""

import math
from collections.abc import Mapping, Sequence

import tensorflow as tf

from keras_kfc.curvature.api import Curvature, CurvatureBlock
from keras_kfc.curvature.products import BlockOfProducts
from keras_kfc.placement.current import current_placement, replica_number
from keras_kfc.placement.sharded import evenly


def shared_natural_gradient(
    curvature: Curvature, gradients: Mapping[int, tf.Tensor]
) -> dict[int, tf.Tensor]:
    """`F⁻¹ g` for every covered variable with a gradient, by index; in replica context.

    Args:
        curvature: The curvature.
        gradients: Gradients by index, of known shapes, the same on all replicas.
    """
    placement = current_placement()
    members = [
        [index for index in block.indices.every if index in gradients] for block in curvature.blocks
    ]
    costs = [
        _products(block, gradients) if own else 0.0
        for block, own in zip(curvature.blocks, members, strict=True)
    ]
    shares = [
        [index for block in share for index in members[block]]
        for share in evenly(costs, placement.count)
    ]
    ours = shares[replica_number()]
    found = curvature.natural_gradient({index: gradients[index] for index in ours})
    dtype_of = {
        index: block.ema_weight.dtype
        for block, own in zip(curvature.blocks, members, strict=True)
        for index in own
    }
    dtype = tf.float64 if "float64" in dtype_of.values() else tf.float32
    vector = _joined([found[index] for index in ours], dtype)
    rows = _exchanged(vector, [_length(share, gradients) for share in shares])
    directions: dict[int, tf.Tensor] = {}
    for share, row in zip(shares, rows, strict=True):
        if not share:
            continue
        sizes = [_length([index], gradients) for index in share]
        for index, part in zip(share, tf.split(row, sizes), strict=True):
            own = tf.reshape(part, gradients[index].shape)
            directions[index] = tf.cast(own, dtype_of[index])
    return directions


def _exchanged(vector: tf.Tensor, lengths: Sequence[int]) -> list[tf.Tensor]:
    """The vectors of all replicas, of these lengths, in the way that sends fewer numbers."""
    placement, number = current_placement(), replica_number()
    if placement.count * max(lengths) <= 2 * sum(lengths):
        padded = tf.pad(vector, ((0, max(lengths) - lengths[number]),))
        rows = tf.unstack(placement.gather(padded), placement.count)
        return [row[:length] for row, length in zip(rows, lengths, strict=True)]
    before, after = sum(lengths[:number]), sum(lengths[number + 1 :])
    (whole,) = placement.sum([tf.pad(vector, ((before, after),))])
    return tf.split(whole, list(lengths))


def _products(block: CurvatureBlock, gradients: Mapping[int, tf.Tensor]) -> float:
    if isinstance(block, BlockOfProducts):
        return block.costs()[0]
    return float(_length([block.kernel_index], gradients))


def _length(indices: Sequence[int], gradients: Mapping[int, tf.Tensor]) -> int:
    return sum(math.prod(gradients[index].shape) for index in indices if index in gradients)


def _joined(tensors: Sequence[tf.Tensor], dtype: tf.DType) -> tf.Tensor:
    flat = [tf.cast(tf.reshape(tensor, (-1,)), dtype) for tensor in tensors]
    return tf.concat([tf.zeros((0,), dtype), *flat], axis=0)
