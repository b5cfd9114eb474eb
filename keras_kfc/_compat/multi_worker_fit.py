"""Keras's `fit` under `tf.distribute.MultiWorkerMirroredStrategy`. Read in Keras 3.15.

In Keras 3.15, `fit` and `evaluate` fail under it with any optimizer
([keras-team/keras 20329](https://github.com/keras-team/keras/issues/20329),
[20585](https://github.com/keras-team/keras/issues/20585)): to find the shapes of a batch, Keras
reduces a structure of values as if it were one value, and it takes the mean of the workers'
numbers along an axis that numbers do not have. Where the installed Keras does so, what it does for
replicas of one machine is done here in its place, for this strategy; elsewhere nothing changes.
"""

import contextlib
import functools
import types
from collections.abc import Iterator
from typing import Any

import tensorflow as tf
from keras.src.backend.tensorflow import trainer

_STRATEGIES = (
    tf.distribute.MultiWorkerMirroredStrategy,
    tf.distribute.experimental.MultiWorkerMirroredStrategy,
)
_MENDED: set[str] = set()


def mend_fit() -> None:
    """Lets `fit` and `evaluate` work if the strategy that is in force has several workers."""
    if not _has_workers(tf.distribute.get_strategy()):
        return
    if "reduction" not in _MENDED and reduces_numbers_along_an_axis():
        trainer.reduce_per_replica = _mended_reduction(trainer.reduce_per_replica)
    if "build" not in _MENDED and reduces_structures():
        kind = trainer.TensorFlowTrainer
        kind._maybe_symbolic_build = _mended_build(kind._maybe_symbolic_build)
    _MENDED.update(("reduction", "build"))


def _has_workers(strategy: Any) -> bool:
    return isinstance(strategy, _STRATEGIES) and strategy.num_replicas_in_sync > 1


def _mended_reduction(original: Any) -> Any:
    @functools.wraps(original)
    def reduce_per_replica(values: Any, strategy: Any, reduction: str) -> Any:
        if not _has_workers(strategy) or reduction not in ("auto", "mean"):
            return original(values, strategy, reduction)
        return tf.nest.map_structure(lambda value: strategy.reduce("MEAN", value, None), values)

    return reduce_per_replica


def _mended_build(original: Any) -> Any:
    @functools.wraps(original)
    def _maybe_symbolic_build(self: Any, iterator: Any = None, data_batch: Any = None) -> Any:
        strategy = self._distribute_strategy
        if iterator is None or not _has_workers(strategy):
            return original(self, iterator, data_batch)
        for _, _, batches in iterator:
            # Shapes are all that counts.
            data_batch = tf.nest.map_structure(
                functools.partial(_first_local, strategy), next(batches)
            )
            break
        return original(self, data_batch=data_batch)

    return _maybe_symbolic_build


def _first_local(strategy: Any, value: Any) -> Any:
    return strategy.experimental_local_results(value)[0]


class _Probe(tf.distribute.MultiWorkerMirroredStrategy):
    """A strategy that notes what it is asked to reduce."""

    extended = types.SimpleNamespace(_in_multi_worker_mode=lambda: True)

    def __init__(self) -> None:
        self.seen: list[tuple[Any, Any]] = []

    def reduce(self, reduce_op: Any, value: Any, axis: Any = None) -> Any:
        del reduce_op
        self.seen.append((value, axis))
        return value

    @contextlib.contextmanager
    def scope(self) -> Iterator[None]:
        yield


class _Distributed(tf.distribute.DistributedValues):
    """A value of several replicas."""


def reduces_numbers_along_an_axis() -> bool:
    """Whether Keras takes the mean of the workers' numbers along an axis."""
    probe = _Probe()
    trainer.reduce_per_replica(tf.constant(0.0), probe, "auto")
    return any(axis is not None for _, axis in probe.seen)


def reduces_structures() -> bool:
    """Whether Keras reduces a batch of inputs and targets as if it were one value."""
    probe = _Probe()
    batch = (_Distributed(), _Distributed())
    model = types.SimpleNamespace(
        _distribute_strategy=probe, distribute_strategy=probe, _symbolic_build=lambda **_: None
    )
    trainer.TensorFlowTrainer._maybe_symbolic_build(model, iterator=[(0, 1, iter([batch]))])
    return any(isinstance(value, tuple) for value, _ in probe.seen)
