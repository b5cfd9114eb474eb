"""One replica: nothing to sum, nothing to average."""

from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf


class SinglePlacement:
    """A training on one device, or under a strategy with one replica."""

    count = 1

    def __init__(self, strategy: Any = None):
        del strategy

    def sum(self, tensors: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        """The tensors."""
        return list(tensors)

    def run_once(self, function: Callable[[], None]) -> None:
        """Runs it."""
        function()

    def copies(self, variable: keras.Variable) -> list[tf.Variable]:
        """The variable."""
        return [variable.value]

    def average(self, variable: keras.Variable, weights: Sequence[tf.Tensor]) -> None:
        """Leaves the variable as it is."""
