"""Damping that somebody sets: a number, or a schedule."""

from collections.abc import Callable
from typing import Any

import tensorflow as tf


class GivenDamping:
    """Damping as it was given, whatever training does.

    Args:
        value: Tells `λ` of now.
        relative: Whether it is in units of the mean eigenvalue of each block.
    """

    def __init__(self, value: Callable[[], Any], relative: bool):
        self._value = value
        self.relative = relative

    def damping(self) -> tf.Tensor:
        """What was given."""
        return tf.cast(self._value(), tf.float32)
