"""Workers on several machines, by `tf.distribute.MultiWorkerMirroredStrategy`.

Each worker is a process that traces the same step. What they exchange are collective operations,
which wait for those of all other workers: all have to run the same ones in the same order. So
whatever decides whether one runs must have the same value on all workers. Of equal inputs, equal
operations make equal numbers; sums of many terms, which TensorFlow's graph optimiser may order anew
in each process, have to be one operation (`tf.reduce_sum(tf.stack(terms))`, not `tf.add_n`).
"""

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from keras_kfc.placement.api import places
from keras_kfc.placement.mirrored import MirroredPlacement


@places(
    tf.distribute.experimental.MultiWorkerMirroredStrategy,
    "tf.distribute.MultiWorkerMirroredStrategy",
)
@places(
    tf.distribute.MultiWorkerMirroredStrategy,
    "tf.distribute.MultiWorkerMirroredStrategy",
)
class WorkersPlacement(MirroredPlacement):
    """Replicas of several processes, as many in each.

    Args:
        strategy: The strategy.
    """

    @property
    def numbers(self) -> Sequence[int]:
        """Those of this process."""
        here = len(self._strategy.extended.worker_devices)
        resolver = self._strategy.cluster_resolver
        before = int(resolver.task_id or 0) * here
        if resolver.task_type == "worker" and "chief" in resolver.cluster_spec().jobs:
            before += here
        return range(before, before + here)

    def sum_parts(self, parts: Sequence[tf.Tensor]) -> tf.Tensor:
        """Sums by one collective operation."""
        strategy, values = self._strategy, self._values_of(parts)
        total = strategy.extended.reduce_to(tf.distribute.ReduceOp.SUM, values, parts[0].device)
        return strategy.experimental_local_results(total)[0]

    def gather_parts(self, parts: Sequence[tf.Tensor]) -> tf.Tensor:
        """Gathers by a collective operation."""
        return self._strategy.gather(self._values_of([part[None] for part in parts]), axis=0)

    def _values_of(self, parts: Sequence[tf.Tensor]) -> Any:
        remaining = iter(parts)
        return self._strategy.experimental_distribute_values_from_function(
            lambda _: next(remaining)
        )
