"""Keras's `fit` under `tf.distribute.MultiWorkerMirroredStrategy`. Read in Keras 3.15.

In Keras 3.15, `fit` and `evaluate` fail under it with any optimizer
([keras-team/keras 20329](https://github.com/keras-team/keras/issues/20329),
[20585](https://github.com/keras-team/keras/issues/20585)): to find the shapes of a batch, Keras
reduces a structure of values as if it were one, and it takes the mean of the workers' numbers
along an axis that numbers do not have. Where Keras fails so, what it does for several replicas of
one machine is done here in its place; elsewhere nothing is changed.
"""

import functools
from typing import Any

import tensorflow as tf
from keras.src.backend.tensorflow import trainer

_MARK = "_mended_by_keras_kfc"


def _has_workers(strategy: Any) -> bool:
    kinds = (
        tf.distribute.MultiWorkerMirroredStrategy,
        tf.distribute.experimental.MultiWorkerMirroredStrategy,
    )
    return isinstance(strategy, kinds) and strategy.num_replicas_in_sync > 1


def mend_fit() -> None:
    """Lets `fit` and `evaluate` work if the strategy that is in force has several workers."""
    if not _has_workers(tf.distribute.get_strategy()) or hasattr(trainer, _MARK):
        return
    setattr(trainer, _MARK, True)
    trainer.reduce_per_replica = _mended_reduction(trainer.reduce_per_replica)
    kind = trainer.TensorFlowTrainer
    kind._maybe_symbolic_build = _mended_build(kind._maybe_symbolic_build)


def _mended_reduction(original: Any) -> Any:
    @functools.wraps(original)
    def reduce_per_replica(values: Any, strategy: Any, reduction: str) -> Any:
        try:
            return original(values, strategy, reduction)
        except ValueError:
            if not _has_workers(strategy) or reduction not in ("auto", "mean"):
                raise
        return tf.nest.map_structure(lambda value: strategy.reduce("MEAN", value, None), values)

    return reduce_per_replica


def _first_local(strategy: Any, value: Any) -> Any:
    return strategy.experimental_local_results(value)[0]


def _mended_build(original: Any) -> Any:
    @functools.wraps(original)
    def _maybe_symbolic_build(self: Any, iterator: Any = None, data_batch: Any = None) -> Any:
        strategy = self._distribute_strategy
        try:
            return original(self, iterator, data_batch)
        except (TypeError, ValueError):
            if iterator is None or not _has_workers(strategy):
                raise
        iterator.reset()
        for _, _, batches in iterator:
            data_batch = tf.nest.map_structure(
                functools.partial(_first_local, strategy), next(batches)
            )
            break
        return original(self, data_batch=data_batch)

    return _maybe_symbolic_build
