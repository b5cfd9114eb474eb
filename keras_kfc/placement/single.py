"""One replica: nothing to sum, nothing to average."""

from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf


class SinglePlacement:
    """A training on one device, or under a strategy with one replica."""

    count = 1
    numbers = (0,)

    def __init__(self, strategy: Any = None):
        del strategy

    @property
    def devices(self) -> Sequence[str]:
        """Any."""
        return ("",)

    def sum(self, tensors: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        """The tensors."""
        return list(tensors)

    def gather(self, tensor: tf.Tensor) -> tf.Tensor:
        """The tensor."""
        return tensor[None]

    def run_once(self, function: Callable[[], None]) -> None:
        """Runs it."""
        function()

    def copies(self, variable: keras.Variable) -> list[tf.Variable]:
        """The variable."""
        return [variable.value]

    def sum_parts(self, parts: Sequence[tf.Tensor]) -> tf.Tensor:
        """The one part."""
        (part,) = parts
        return part

    def gather_parts(self, parts: Sequence[tf.Tensor]) -> tf.Tensor:
        """The one part."""
        return tf.stack(list(parts))
