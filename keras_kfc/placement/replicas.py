"""What a `tf.distribute` strategy with several replicas needs, and nothing where there is one.

Every replica takes statistics from its own part of the batch into its own copies of
the factors. Gradients are summed in every step; factors are averaged when inverses are
due, which is enough, because an average of moving averages is the moving average of
the average. All replicas then take the same step.
"""

from collections.abc import Callable, Sequence

import keras
import tensorflow as tf


def count_replicas() -> int:
    """Number of replicas that train together.

    Raises:
        ValueError: If the strategy has several, and is not a `MirroredStrategy`.
    """
    strategy = tf.distribute.get_strategy()
    count = strategy.num_replicas_in_sync
    if count > 1 and type(strategy) is not tf.distribute.MirroredStrategy:
        raise ValueError(
            "KFC trains several replicas with `tf.distribute.MirroredStrategy` only. Received: "
            f"a {type(strategy).__name__} with {count} replicas"
        )
    return count


def replica_number() -> int:
    """Number of the replica that is being traced, from 0."""
    context = tf.distribute.get_replica_context()
    if context is None or context.num_replicas_in_sync == 1:
        return 0
    return int(tf.get_static_value(context.replica_id_in_sync_group))


def sum_over_replicas(tensors: Sequence[tf.Tensor]) -> list[tf.Tensor]:
    """Sums each tensor over all replicas; to be called outside of conditions.

    Args:
        tensors: Tensors of this replica.
    """
    if count_replicas() == 1:
        return list(tensors)
    context = tf.distribute.get_replica_context()
    return list(context.all_reduce(tf.distribute.ReduceOp.SUM, list(tensors)))


def in_cross_replica_context(function: Callable[[], None]) -> None:
    """Runs a function once for all replicas.

    Args:
        function: It may read and assign variables on all replicas, in conditions too.
    """
    if count_replicas() == 1:
        function()
    else:
        tf.distribute.get_replica_context().merge_call(lambda _: function())


def copies_of(variable: keras.Variable) -> list[tf.Variable]:
    """The copies of a variable on all replicas, in cross-replica context; itself if alone.

    Args:
        variable: An optimizer variable.
    """
    if count_replicas() == 1:
        return [variable.value]
    return list(tf.distribute.get_strategy().experimental_local_results(variable.value))
