"""One training run: an optimizer on a task, measured on a fixed schedule with the clock stopped."""

import ast
import dataclasses
import datetime
import json
import math
import pathlib
import time
from typing import Any

import keras
import numpy as np
import tensorflow as tf

import keras_kfc
from benchmarks.lars import LARS
from benchmarks.tasks import Task

# Training loss is measured on so many examples of the training set.
EVALUATION = 10_000
SESSION = datetime.datetime.now().isoformat(timespec="seconds")


@dataclasses.dataclass
class Run:
    """What one run gave; its fields are those of the JSON file.

    Attributes:
        task: Name of the task.
        setting: The optimizer, as a call, for example `SGD(0.1, momentum=0.9)`.
        batch_size: Mini-batch size.
        seed: Seed of the initial weights and of the order of the examples.
        session: When the session began that the run took turns in.
        start_up: Seconds until the first step was traced and had run.
        iterations: Iterations at which was measured; the first is 0.
        seconds: Seconds of training steps until then.
        losses: Losses on the first examples of the training set.
        test_losses: Losses on the test set.
        test_accuracies: Accuracies there, if outputs are probabilities of classes.
    """

    task: str
    setting: str
    batch_size: int
    seed: int
    session: str = ""
    start_up: float = 0.0
    iterations: list[int] = dataclasses.field(default_factory=list)
    seconds: list[float] = dataclasses.field(default_factory=list)
    losses: list[float] = dataclasses.field(default_factory=list)
    test_losses: list[float] = dataclasses.field(default_factory=list)
    test_accuracies: list[float] = dataclasses.field(default_factory=list)

    def first_at(self, loss: float | None = None, accuracy: float | None = None) -> int | None:
        """Number of the first measurement at or below a training loss, or at an accuracy."""
        for i, measured in enumerate(self.losses):
            if loss is not None and measured <= loss:
                return i
            if accuracy is not None and self.test_accuracies[i] >= accuracy:
                return i
        return None

    @property
    def diverged(self) -> bool:
        """Whether the loss is lost: not finite, or ten times the first."""
        return not self.losses[-1] <= 10 * self.losses[0]

    def save(self, path: pathlib.Path, **more: Any) -> None:
        """Writes the run as JSON, whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        content = {**dataclasses.asdict(self), **more}
        for name in ("losses", "test_losses"):
            # JSON knows no infinity.
            content[name] = [x if math.isfinite(x) else None for x in content[name]]
        partial.write_text(json.dumps(content, allow_nan=False) + "\n")
        partial.replace(path)

    @classmethod
    def load(cls, path: pathlib.Path) -> "Run":
        """Reads a run."""
        content = json.loads(path.read_text())
        for name in ("losses", "test_losses"):
            content[name] = [math.inf if x is None else x for x in content[name]]
        return cls(**{field.name: content[field.name] for field in dataclasses.fields(cls)})


def optimizer_of(setting: str, seed: int = 1, steps: int | None = None) -> keras.Optimizer:
    """Makes an optimizer.

    Args:
        setting: A call like `KFC(damping=0.3)` or `SGD(0.05, momentum=0.9)`, with numbers
            and other literals as arguments, or `cosine(0.03)`, a cosine schedule from there to
            zero at the last step.
        seed: Seed of KFC's drawn targets.
        steps: Number of steps of the training, for schedules.

    Returns:
        The optimizer.

    Raises:
        ValueError: If the text is no such call, or there is no such optimizer.
    """
    try:
        call = ast.parse(setting, mode="eval").body
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
            raise ValueError("it is not a call")
        positional = [_value(argument, steps) for argument in call.args]
        named = {str(option.arg): _value(option.value, steps) for option in call.keywords}
        if call.func.id == "KFC":
            return keras_kfc.KFC(*positional, **{"seed": seed, **named})
        if call.func.id == "LARS":
            return LARS(*positional, **named)
        return getattr(keras.optimizers, call.func.id)(*positional, **named)
    except (SyntaxError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(
            "Argument `setting` must be a call of an optimizer like KFC(damping=0.3). "
            f"Received: setting={setting} ({error})"
        ) from error


def _value(node: ast.expr, steps: int | None) -> Any:
    """The value of an argument: a literal, or a cosine schedule."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "cosine":
        if steps is None:
            raise ValueError("the number of steps is not known here")
        return keras.optimizers.schedules.CosineDecay(ast.literal_eval(node.args[0]), steps)
    return ast.literal_eval(node)


def schedule(budget: int, growth: float = 1.1) -> list[int]:
    """Iterations at which runs are measured: each by a factor later than the one before."""
    marks = [0]
    while marks[-1] < budget:
        marks.append(min(budget, max(marks[-1] + 1, round(marks[-1] * growth))))
    # At the start every iteration would count, which no table needs.
    return [mark for mark in marks if mark == 0 or mark >= min(10, budget)]


class Trainer:
    """Trains a model for a run; several trainers can take turns.

    Args:
        task: The task.
        setting: The optimizer; see `optimizer_of`.
        batch_size: Mini-batch size.
        seed: Seed of initial weights, order of the examples, and drawn targets.
    """

    def __init__(self, task: Task, setting: str, batch_size: int, seed: int):
        self.run = Run(task.name, setting, batch_size, seed, session=SESSION)
        self._task = task
        self._model = task.build(seed)
        optimizer = optimizer_of(setting, seed)
        if isinstance(optimizer, keras_kfc.KFC):
            keras_kfc.instrument(self._model)
        self._model.compile(optimizer=optimizer, loss=task.loss)
        self._rng = np.random.default_rng(seed)
        self._order = np.zeros(0, np.int64)
        self._iteration, self._seconds = 0, 0.0
        self._outputs = tf.function(lambda x: self._model(x, training=False))

    def start(self) -> None:
        """Traces and compiles the training step by running it once, and undoes that step.

        To be called when all trainers that take turns are made: a model that is built sets
        TensorFlow's seed, which throws away what TensorFlow had prepared for other models.
        """
        model = self._model
        begin = time.perf_counter()
        model.optimizer.build(model.trainable_variables)
        kept = [(v, v.numpy()) for v in (*model.variables, *model.optimizer.variables)]
        model.train_on_batch(*self._batch())
        self.run.start_up = time.perf_counter() - begin
        for variable, value in kept:
            variable.assign(value)
        self._rng = np.random.default_rng(self.run.seed)
        self._order = np.zeros(0, np.int64)
        self.measure()

    def _batch(self):
        count = len(self._task.train_inputs)
        while len(self._order) < self.run.batch_size:
            # What is left of an epoch leads the next one, so that all batches are full.
            self._order = np.concatenate([self._order, self._rng.permutation(count)])
        chosen = self._order[: self.run.batch_size]
        self._order = self._order[self.run.batch_size :]
        inputs, targets = self._task.train_inputs[chosen], self._task.train_targets[chosen]
        return tf.constant(inputs), tf.constant(targets)

    def train_to(self, iteration: int) -> None:
        """Trains up to an iteration."""
        for _ in range(iteration - self._iteration):
            inputs, targets = self._batch()
            begin = time.perf_counter()
            self._model.train_on_batch(inputs, targets)
            self._seconds += time.perf_counter() - begin
        self._iteration = iteration

    def measure(self) -> None:
        """Adds the losses of now to the run."""
        task, run = self._task, self.run
        loss, _ = self._evaluate(task.train_inputs[:EVALUATION], task.train_targets[:EVALUATION])
        test_loss, accuracy = self._evaluate(task.test_inputs, task.test_targets)
        run.iterations.append(self._iteration)
        run.seconds.append(self._seconds)
        run.losses.append(loss)
        run.test_losses.append(test_loss)
        if task.classifies:
            run.test_accuracies.append(accuracy)

    def _evaluate(self, inputs, targets, chunk=1000):
        """Loss, and accuracy where there is one, in inference mode."""
        loss_function = keras.losses.get(self._task.loss)
        total, right = 0.0, 0
        for first in range(0, len(inputs), chunk):
            part = slice(first, first + chunk)
            outputs = self._outputs(tf.constant(inputs[part]))
            total += float(tf.reduce_sum(loss_function(targets[part], outputs)))
            if self._task.classifies:
                right += int(np.sum(outputs.numpy().argmax(-1) == targets[part]))
        loss = total / len(inputs)
        return (loss if math.isfinite(loss) else math.inf), right / len(inputs)
