"""Replicas on several devices of one machine, by `tf.distribute.MirroredStrategy`."""

from collections.abc import Callable, Sequence

import keras
import tensorflow as tf

from keras_kfc.placement.api import places


@places(tf.distribute.MirroredStrategy, "tf.distribute.MirroredStrategy")
class MirroredPlacement:
    """Replicas that are traced as interleaved threads of one process.

    Args:
        strategy: The strategy.
    """

    def __init__(self, strategy: tf.distribute.MirroredStrategy):
        self._strategy = strategy

    @property
    def count(self) -> int:
        """Number of replicas."""
        return int(self._strategy.num_replicas_in_sync)

    @property
    def numbers(self) -> Sequence[int]:
        """All of them."""
        return range(self.count)

    @property
    def devices(self) -> Sequence[str]:
        """The devices of the strategy."""
        return list(self._strategy.extended.worker_devices)

    def sum(self, tensors: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        """Sums each tensor over all replicas."""
        context = tf.distribute.get_replica_context()
        return list(context.all_reduce(tf.distribute.ReduceOp.SUM, list(tensors)))

    def gather(self, tensor: tf.Tensor) -> tf.Tensor:
        """The tensors of all replicas."""
        return tf.distribute.get_replica_context().all_gather(tensor[None], axis=0)

    def run_once(self, function: Callable[[], None]) -> None:
        """Runs a function in cross-replica context."""
        tf.distribute.get_replica_context().merge_call(lambda _: function())

    def copies(self, variable: keras.Variable) -> list[tf.Variable]:
        """The copies of a variable."""
        return list(self._strategy.experimental_local_results(variable.value))

    def sum_parts(self, parts: Sequence[tf.Tensor]) -> tf.Tensor:
        """Adds tensors up on one device."""
        return tf.add_n(list(parts))

    def gather_parts(self, parts: Sequence[tf.Tensor]) -> tf.Tensor:
        """Puts tensors together on one device."""
        return tf.stack(list(parts))
