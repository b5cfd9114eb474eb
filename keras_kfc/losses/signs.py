"""Random signs that follow from a seed alone, on every device and under XLA.

TensorFlow's stateless random numbers differ under XLA, and the exact Fisher matrix should
not. These are bits of SplitMix64 (Steele, Lea & Flood, 2014, "Fast splittable pseudorandom
number generators"), a hash of a counter.
"""

from typing import Any

import tensorflow as tf

# The constants of SplitMix64, as signed integers: products wrap around.
_STEP = 0x9E3779B97F4A7C15 - (1 << 64)
_FIRST = 0xBF58476D1CE4E5B9 - (1 << 64)
_SECOND = 0x94D049BB133111EB - (1 << 64)


def random_signs(shape: Any, seed: tf.Tensor, dtype: tf.DType) -> tf.Tensor:
    """Independent signs, -1 or 1: zero mean and unit variance, as draws of targets have.

    Args:
        shape: Shape of the result, integers or a tensor.
        seed: Two 64-bit integers; other seeds give unrelated signs.
        dtype: Type of the result.
    """
    start = _mixed(seed[0] + _mixed(seed[1]))
    counter = tf.range(tf.cast(tf.reduce_prod(shape), tf.int64), dtype=tf.int64)
    bits = _mixed(tf.cast(start, tf.int64) + (counter + 1) * _STEP)
    return tf.reshape(tf.where(bits < 0, -tf.ones((), dtype), tf.ones((), dtype)), shape)


def _mixed(state: tf.Tensor) -> tf.Tensor:
    state = (state ^ _shifted(state, 30)) * _FIRST
    state = (state ^ _shifted(state, 27)) * _SECOND
    return state ^ _shifted(state, 31)


def _shifted(state: tf.Tensor, places: int) -> tf.Tensor:
    """Shifts to the right, with zeros coming in, which TensorFlow does for unsigned types only."""
    moved = tf.bitwise.right_shift(state, tf.constant(places, state.dtype))
    return moved & ((1 << (64 - places)) - 1)
