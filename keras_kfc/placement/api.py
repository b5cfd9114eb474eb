"""Where a training runs, and what that means for sums over batches and for variables.

Each replica takes statistics from its own part of the batch into its own copies of the factors.
Gradients are summed in every step; factors are averaged when inverses are due, which is
enough, because an average of moving averages is the moving average of the average.
All replicas then take the same step.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

import keras
import tensorflow as tf


class Placement(Protocol):
    """One way of placing a training on devices."""

    @property
    def count(self) -> int:
        """Number of replicas that train together."""

    def sum(self, tensors: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        """Sums each tensor over all replicas; in replica context, outside of conditions."""

    def run_once(self, function: Callable[[], None]) -> None:
        """Runs a function once for all replicas; in replica context.

        Args:
            function: It may read and assign variables on all replicas, in conditions too.
        """

    def copies(self, variable: keras.Variable) -> list[tf.Variable]:
        """The copies of an optimizer variable on all replicas; in cross-replica context."""

    def average(self, variable: keras.Variable, weights: Sequence[tf.Tensor]) -> None:
        """Gives all copies of a variable their weighted mean; in cross-replica context.

        Args:
            variable: An optimizer variable.
            weights: A scalar for each copy, not negative. If all are 0, the copies become 0; a
                single copy stays as it is.
        """


PLACEMENTS: dict[type, Callable[[Any], Placement]] = {}
Kind = TypeVar("Kind", bound=type)


def places(strategy: type) -> Callable[[Kind], Kind]:
    """Registers a class as the placement under a `tf.distribute` strategy of several replicas.

    Args:
        strategy: The class of the strategy; subclasses of it have to be registered by themselves.
    """

    def register(kind: Kind) -> Kind:
        PLACEMENTS[strategy] = kind
        return kind

    return register
