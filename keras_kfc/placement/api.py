"""Where a training runs, and what that means for sums over batches and for variables.

Each replica takes statistics from its own part of the batch into its own copies of the factors.
The copies are averaged in the same step, before anything uses them; gradients are summed in every
step. So all replicas take the same step, and have the same state whenever a step is over.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

import keras
import tensorflow as tf


class Placement(Protocol):
    """One way of placing a training on devices.

    A replica is *local* if this process traces it.
    """

    @property
    def count(self) -> int:
        """Number of replicas that train together."""

    @property
    def numbers(self) -> Sequence[int]:
        """Numbers of the local replicas, among all from 0."""

    @property
    def devices(self) -> Sequence[str]:
        """Devices of the local replicas."""

    def sum(self, tensors: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        """Sums each tensor over all replicas; in replica context, outside of conditions."""

    def gather(self, tensor: tf.Tensor) -> tf.Tensor:
        """The tensors of all replicas, of one shape, `(count, ...)`; otherwise like `sum`."""

    def run_once(self, function: Callable[[], None]) -> None:
        """Runs a function once for all replicas of a process; in replica context.

        Args:
            function: It may read and assign variables on all replicas, in conditions too.
        """

    def copies(self, variable: keras.Variable) -> list[tf.Variable]:
        """The copies of an optimizer variable on the local replicas; in cross-replica context."""

    def sum_parts(self, parts: Sequence[tf.Tensor]) -> tf.Tensor:
        """Sums tensors of one shape over all replicas; in cross-replica context, in conditions too.

        Args:
            parts: A tensor for each local replica.
        """

    def gather_parts(self, parts: Sequence[tf.Tensor]) -> tf.Tensor:
        """Tensors of all replicas in their order, `(count, ...)`; otherwise like `sum_parts`."""


PLACEMENTS: dict[type, Callable[[Any], Placement]] = {}
# Public names of these strategies, in order and each once, for messages.
NAMES: dict[str, None] = {}
Kind = TypeVar("Kind", bound=type)


def places(strategy: type, name: str) -> Callable[[Kind], Kind]:
    """Registers a class as the placement under a `tf.distribute` strategy of several replicas.

    Args:
        strategy: The class of the strategy; subclasses of it have to be registered by themselves.
        name: Its public name.
    """

    def register(kind: Kind) -> Kind:
        PLACEMENTS[strategy] = kind
        NAMES[name] = None
        return kind

    return register
