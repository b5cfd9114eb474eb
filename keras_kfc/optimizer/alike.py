"""What has to be the same on all workers that train together."""

import importlib.metadata
from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from keras_kfc.curvature.choice import planned_blocks
from keras_kfc.placement.agreement import check_alike
from keras_kfc.placement.current import current_placement

_PACKAGES = ("keras-kfc", "keras", "tensorflow")


def check_workers(optimizer: Any, variables: Sequence[Any]) -> None:
    """Refuses to train with workers of another configuration, model or version.

    Args:
        optimizer: The `keras_kfc.KFC`.
        variables: The trainable variables.

    Raises:
        ValueError: On all workers, if any two differ.
    """
    # In a loop of one's own the first step may build it, where no worker can be asked.
    if not tf.executing_eagerly() or not tf.distribute.in_cross_replica_context():
        return
    placement = current_placement()
    if len(placement.numbers) == placement.count:
        # One process knows itself.
        return
    blocks = planned_blocks(
        variables, optimizer.structure, optimizer.max_factor_dim, optimizer.weight_sharing
    )
    facts = {
        **{key: value for key, value in optimizer.get_config().items() if key != "name"},
        **{f"version of {name}": _version(name) for name in _PACKAGES},
        "variables": [[list(variable.shape), str(variable.dtype)] for variable in variables],
        "blocks": [
            [plan.kernel_index, plan.structure, type(plan.layout.linear_map).__name__]
            for plan in blocks
        ],
    }
    check_alike(placement, facts)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
