"""Trains a task with an optimizer from several initial weights, and measures the loss meanwhile."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

import keras_kfc
from benchmarks.everyday.own_steps import optimizers_of
from benchmarks.everyday.task import Task

# Points of a learning curve after the start.
POINTS = 10
# Below this part of the loss at the start, all count as equally good.
NEGLIGIBLE = 1e-4


@dataclasses.dataclass
class Run:
    """One training.

    Args:
        curve: Loss over all training examples at the start and after each tenth of the
            steps, above the task's floor.
        test: Loss over the test examples at the end, likewise.
        last_points: How many of the last points count as the end.
    """

    curve: list[float]
    test: float
    last_points: int = 1

    @property
    def end(self) -> float:
        """The loss at the end; not below a ten-thousandth of that at the start."""
        return _above(self._last, NEGLIGIBLE * self.curve[0])

    @property
    def area(self) -> float:
        """Mean of the curve, without the start, on the same terms."""
        return _above(float(np.mean(self.curve[1:])), NEGLIGIBLE * self.curve[0])

    @property
    def diverged(self) -> bool:
        """Whether the loss is above that of the start at the end, or no number."""
        return not self._last <= self.curve[0]

    @property
    def _last(self) -> float:
        return float(np.mean(self.curve[-self.last_points :]))


def _above(value: float, least: float) -> float:
    return max(value, least) if math.isfinite(value) else math.inf


class Trainer:
    """A compiled model of one task, which is traced once and trained again and again.

    Args:
        task: The task.
        batch_size: The batch size.
        steps: Number of steps of a training.
        make_optimizer: Makes the optimizer; its learning rate may be changed for each run.
        instrumented: Whether layers are instrumented for KFC.
    """

    def __init__(
        self,
        task: Task,
        batch_size: int,
        steps: int,
        make_optimizer: Callable[[], keras.optimizers.Optimizer],
        instrumented: bool,
    ):
        self._task, self._batch_size, self._steps = task, batch_size, steps
        self._make_optimizer, self._instrumented = make_optimizer, instrumented
        self._data = task.data(np.random.default_rng(0))
        self._compile()

    def _compile(self) -> None:
        keras.utils.set_random_seed(1)
        task = self._task
        self._model = task.model()
        if self._instrumented:
            keras_kfc.instrument(self._model)
        options: dict[str, Any] = {"loss": task.loss} if task.loss is not None else {}
        self._model.compile(
            self._make_optimizer(),
            **options,
            **task.options,
            steps_per_execution=self._steps // POINTS,
            jit_compile=False,
        )
        for optimizer, owner in self._owners():
            optimizer.build(owner.trainable_variables)
        self._initial = [np.array(v) for v in self._optimizer_variables()]
        self._measure = tf.function(self._loss, autograph=False, reduce_retracing=True)

    def _owners(self):
        optimizers = optimizers_of(self._model)
        if len(optimizers) == 1:
            return [(optimizers[0], self._model)]
        return [(optimizers[0], self._model.generator), (optimizers[1], self._model.discriminator)]

    def _optimizer_variables(self):
        return [v for optimizer in optimizers_of(self._model) for v in optimizer.variables]

    def _loss(self, x, y, weight):
        if self._task.measure is not None:
            return self._task.measure(self._model, x, y, weight)
        outputs = self._model(x, training=False)
        return self._model.compute_loss(x=x, y=y, y_pred=outputs, sample_weight=weight)

    def run(self, seed: int, learning_rate: float | None = None) -> Run:
        """Trains once.

        Args:
            seed: For weights and the order of batches.
            learning_rate: Learning rate, or None for the optimizer's own.
        """
        current = self._optimizer_variables()
        if len(current) != len(self._initial):
            # The optimizer was built anew in its first step.
            self._compile()
            current = self._optimizer_variables()
        keras.utils.set_random_seed(seed)
        fresh = self._task.model()
        for ours, theirs in zip(_state_of(self._model), _state_of(fresh), strict=True):
            ours.assign(theirs)
        for variable, value in zip(current, self._initial, strict=True):
            variable.assign(value)
        for optimizer in optimizers_of(self._model):
            if learning_rate is not None:
                optimizer.learning_rate = learning_rate
        data, floor = self._data, self._task.floor_of(self._data)

        def measured() -> float:
            return float(self._measure(data.x, data.y, data.weight)) - floor

        curve = [measured()]
        measuring = keras.callbacks.LambdaCallback(
            on_epoch_end=lambda epoch, logs: curve.append(measured())
        )
        self._model.fit(
            self._batches(seed),
            epochs=POINTS,
            steps_per_epoch=self._steps // POINTS,
            callbacks=[measuring],
            verbose=0,
        )
        test = float(self._measure(data.x_test, data.y_test, data.weight_test)) - floor
        return Run(curve, test, self._task.last_points)

    def _batches(self, seed: int) -> tf.data.Dataset:
        data = self._data
        parts = (data.x, data.y) if data.weight is None else (data.x, data.y, data.weight)
        length = len(keras.tree.flatten(data.x)[0])
        dataset = tf.data.Dataset.from_tensor_slices(parts).cache()
        return dataset.shuffle(length, seed=seed).batch(self._batch_size).repeat()


def _state_of(model: keras.Model) -> list[keras.Variable]:
    """Weights and states of random number generators."""
    seeds = [v for v in model.variables if v.name == "seed_generator_state"]
    return [*model.weights, *seeds]
