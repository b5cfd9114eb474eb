"""The placement of the `tf.distribute` strategy that is in force now."""

import tensorflow as tf

from keras_kfc.placement.api import NAMES, PLACEMENTS, Placement
from keras_kfc.placement.single import SinglePlacement

_SINGLE = SinglePlacement()


def current_placement() -> Placement:
    """The placement of now.

    Raises:
        ValueError: If several replicas train under a strategy that has no placement.
    """
    strategy = tf.distribute.get_strategy()
    count = strategy.num_replicas_in_sync
    if count == 1:
        return _SINGLE
    if type(strategy) not in PLACEMENTS:
        known = " or ".join(f"`{name}`" for name in NAMES)
        raise ValueError(
            f"KFC trains several replicas with {known} only. Received: "
            f"a {type(strategy).__name__} with {count} replicas"
        )
    return PLACEMENTS[type(strategy)](strategy)


def replica_number() -> int:
    """Number of the replica that is being traced, from 0, under any strategy."""
    context = tf.distribute.get_replica_context()
    if context is None or context.num_replicas_in_sync == 1:
        return 0
    return int(tf.get_static_value(context.replica_id_in_sync_group))
