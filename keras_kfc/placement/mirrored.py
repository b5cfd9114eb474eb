"""Replicas on several devices of one machine, by `tf.distribute.MirroredStrategy`."""

from collections.abc import Callable, Sequence

import keras
import tensorflow as tf

from keras_kfc.placement.api import places


@places(tf.distribute.MirroredStrategy)
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

    def sum(self, tensors: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        """Sums each tensor over all replicas."""
        context = tf.distribute.get_replica_context()
        return list(context.all_reduce(tf.distribute.ReduceOp.SUM, list(tensors)))

    def run_once(self, function: Callable[[], None]) -> None:
        """Runs a function in cross-replica context."""
        tf.distribute.get_replica_context().merge_call(lambda _: function())

    def copies(self, variable: keras.Variable) -> list[tf.Variable]:
        """The copies of a variable."""
        return list(self._strategy.experimental_local_results(variable.value))

    def average(self, variable: keras.Variable, weights: Sequence[tf.Tensor]) -> None:
        """Gives all copies of a variable their weighted mean."""
        total = tf.add_n(list(weights))
        mean = tf.add_n(
            [
                tf.math.divide_no_nan(weight, total) * copy
                for weight, copy in zip(weights, self.copies(variable), strict=True)
            ]
        )
        variable.value.assign(mean)
