"""Which types numbers are kept and computed in."""

import functools
from collections.abc import Sequence
from typing import Any

import tensorflow as tf


def at_least_float32(tensor: tf.Tensor) -> tf.Tensor:
    """Casts to float32, except float64, which keeps its precision."""
    return tensor if tensor.dtype == tf.float64 else tf.cast(tensor, tf.float32)


def factor_dtype(kernel: Any) -> str:
    """Dtype of a layer's factors, at least float32: that of their sums over many positions.

    Args:
        kernel: The layer's kernel variable.
    """
    return "float64" if kernel.dtype == "float64" else "float32"


def resolution(dtype: tf.DType) -> float:
    """The distance of 1 from the next number, `ε`."""
    return 2.0**-52 if dtype == tf.float64 else 2.0**-23


def all_finite(tensors: list[Any]) -> tf.Tensor:
    """Whether no entry of any tensor is NaN or infinite, a boolean scalar."""
    parts = [tf.reduce_all(tf.math.is_finite(tensor)) for tensor in tensors]
    # Fewer operations than a stack where there are few.
    return functools.reduce(tf.logical_and, parts) if len(parts) < 4 else tf.reduce_all(parts)


def stacked(scalars: Sequence[Any]) -> tf.Tensor:
    """Scalars as one tensor, `(N,)`, float64 if dtypes differ."""
    tensors = [tf.convert_to_tensor(scalar) for scalar in scalars]
    if len({tensor.dtype for tensor in tensors}) > 1:
        tensors = [tf.cast(tensor, tf.float64) for tensor in tensors]
    return tf.stack(tensors)
