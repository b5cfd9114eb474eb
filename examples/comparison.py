"""Trains the same net with several optimizers, each to the same training loss, and shows how soon.

Every optimizer gets the same initial weights and batches. Seconds are all that `fit` takes, with
the first step, which traces the graph; the clock stops only while the training loss is measured.
"""

import dataclasses
import pathlib
import time
from collections.abc import Callable, Sequence

import keras
import numpy as np
import tensorflow as tf
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import keras_kfc


@dataclasses.dataclass(frozen=True)
class Task:
    """What is trained, on what, and when it is done.

    Attributes:
        title: For the picture.
        build: Makes the net for a seed, with the same initial weights every time.
        loss: Name of Keras's loss.
        train: Inputs and targets to train on.
        test: Inputs and targets that are held out.
        target: Training loss at which a run ends.
        batch_size: Mini-batch size.
        epochs: The most epochs of a run.
        counts: Whether outputs are probabilities of classes, so that there is an accuracy.
        measured: The training loss is that of the first so many examples: measuring takes time.
    """

    title: str
    build: Callable[[int], keras.Model]
    loss: str
    train: tuple[np.ndarray, np.ndarray]
    test: tuple[np.ndarray, np.ndarray]
    target: float
    batch_size: int
    epochs: int
    counts: bool
    measured: int = 10_000


@dataclasses.dataclass
class Run:
    """One training run.

    Attributes:
        name: The optimizer, as a call.
        model: The trained model.
        start_up: Seconds until the first step was done.
        iterations: Iterations at which the training loss was measured.
        seconds: Seconds until then, with the start-up.
        losses: The training losses.
        test_loss: Loss on held-out data after training.
        test_accuracy: Accuracy there, or NaN.
        reached: Whether the last loss is the target or below.
    """

    name: str
    model: keras.Model
    start_up: float = 0.0
    iterations: list[int] = dataclasses.field(default_factory=list)
    seconds: list[float] = dataclasses.field(default_factory=list)
    losses: list[float] = dataclasses.field(default_factory=list)
    test_loss: float = float("nan")
    test_accuracy: float = float("nan")
    reached: bool = False

    @property
    def final_loss(self) -> float:
        """The last training loss, infinite if training diverged."""
        return self.losses[-1] if np.isfinite(self.losses[-1]) else float("inf")


class _Watch(keras.callbacks.Callback):
    """Measures the training loss now and then, with the clock stopped; ends a run at its target."""

    def __init__(self, run: Run, task: Task, show: Callable[[float], None]):
        super().__init__()
        self._run, self._task, self._show = run, task, show
        self._loss_of = _graph_of_loss(run.model, task.loss)
        self._iteration, self._next, self._paused = 0, 1, 0.0

    def on_train_begin(self, logs=None):
        self._begin = time.perf_counter()
        self._measure()

    def on_train_batch_end(self, batch, logs=None):
        self._iteration += 1
        if self._iteration == 1:
            self._run.start_up = time.perf_counter() - self._begin - self._paused
        if self._iteration >= self._next:
            self._measure()
            # Each time after a twenty-fifth more iterations.
            self._next = self._iteration + max(1, self._iteration // 25)
            self.model.stop_training = self._run.reached

    def on_train_end(self, logs=None):
        if self._run.iterations[-1] != self._iteration:
            self._measure()

    def _measure(self) -> None:
        now, run, task = time.perf_counter(), self._run, self._task
        inputs, targets = (part[: task.measured] for part in task.train)
        run.iterations.append(self._iteration)
        run.seconds.append(now - self._begin - self._paused)
        run.losses.append(_mean_loss(self._loss_of, inputs, targets))
        run.reached = run.losses[-1] <= task.target
        # Losses fall by factors: the bar shows how much of the way in factors is done.
        way = np.log(run.losses[0] / task.target)
        self._show(float(np.log(run.losses[0] / max(run.final_loss, task.target)) / way))
        self._paused += time.perf_counter() - now


def _graph_of_loss(model: keras.Model, loss: str) -> Callable[..., tf.Tensor]:
    function = keras.losses.get(loss)
    return tf.function(
        lambda inputs, targets: tf.reduce_mean(function(targets, model(inputs, training=False))),
        autograph=False,
        reduce_retracing=True,
    )


def _mean_loss(loss_of: Callable[..., tf.Tensor], inputs: np.ndarray, targets: np.ndarray) -> float:
    """The mean loss over many examples."""
    total = 0.0
    for first in range(0, len(inputs), 1000):
        chunk = slice(first, first + 1000)
        total += float(loss_of(inputs[chunk], targets[chunk])) * len(inputs[chunk])
    return total / len(inputs)


def train(task: Task, optimizer: keras.Optimizer, name: str, seed: int) -> Run:
    """Trains one net with one optimizer until the task is done.

    Args:
        task: The task.
        optimizer: The optimizer.
        name: What to call it.
        seed: Seed of the weights and of the order of the examples.

    Returns:
        The run.
    """
    model = task.build(seed)
    if isinstance(optimizer, keras_kfc.KFC):
        keras_kfc.instrument(model)
    model.compile(optimizer=optimizer, loss=task.loss)
    batches = tf.data.Dataset.from_tensor_slices(task.train).cache()
    batches = batches.shuffle(len(task.train[0]), seed=seed).batch(task.batch_size).prefetch(2)
    run = Run(name, model)
    columns = (TextColumn("{task.description:28}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns) as progress:
        bar = progress.add_task(name, total=1.0)
        watch = _Watch(run, task, lambda part: progress.update(bar, completed=part))
        model.fit(batches, epochs=task.epochs, shuffle=False, verbose=0, callbacks=[watch])
    inputs, targets = task.test
    run.test_loss = _mean_loss(_graph_of_loss(model, task.loss), inputs, targets)
    if task.counts:
        run.test_accuracy = float(np.mean(model(inputs).numpy().argmax(axis=-1) == targets))
    return run


def best(runs: Sequence[Run]) -> Run:
    """The run that was done first; of those that were not, that with the lowest training loss."""
    return min(
        runs,
        key=lambda run: (not run.reached, run.iterations[-1] if run.reached else run.final_loss),
    )


def table(runs: Sequence[Run], task: Task) -> Table:
    """A table of runs, with ratios to the first."""
    result = Table(title=f"To a training loss of {task.target:g}")
    result.add_column("optimizer", no_wrap=True)
    headings = ["iterations", "×", "seconds", "×", "of these, first step", "held-out loss"]
    for heading in [*headings, "held-out accuracy"] if task.counts else headings:
        result.add_column(heading, justify="right")
    first = runs[0]
    for run in runs:
        more = "" if run.reached else ">"
        cells = [
            run.name,
            f"{more}{run.iterations[-1]:,}",
            f"{more}{run.iterations[-1] / first.iterations[-1]:.1f}",
            f"{more}{run.seconds[-1]:.1f}",
            f"{more}{run.seconds[-1] / first.seconds[-1]:.1f}",
            f"{run.start_up:.1f}",
            f"{run.test_loss:.3g}",
        ]
        result.add_row(*cells, *([f"{run.test_accuracy:.2%}"] if task.counts else []))
    return result


def draw(runs: Sequence[Run], path: pathlib.Path, title: str) -> None:
    """Draws training loss against iterations and against seconds into a PNG file."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), sharey=True, layout="constrained")
    for run, color in zip(runs, ("tab:blue", "tab:orange", "tab:green"), strict=False):
        horizontals: tuple[Sequence[float], Sequence[float]] = (run.iterations, run.seconds)
        for axis, horizontal in zip(axes, horizontals, strict=True):
            axis.plot(horizontal, run.losses, color=color, label=run.name, linewidth=2)
            axis.plot(horizontal[-1], run.losses[-1], "o", color=color)
    for axis, name in zip(axes, ("iterations", "seconds, with the first step"), strict=True):
        axis.set(xlabel=name, yscale="log")
        axis.grid(alpha=0.3, which="both")
        axis.set_xlim(left=0)
    axes[0].set_ylabel("training loss")
    axes[0].legend()
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
