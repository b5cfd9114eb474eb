"""Trains the same net with several optimizers and shows who is ahead.

Every optimizer gets the same initial weights and batches. The clock runs during
training steps only: the training loss is measured in between, and tracing the
graph, which happens once, is timed by itself.
"""

import dataclasses
import pathlib
import time
from collections.abc import Callable, Sequence

import keras
import numpy as np
import tensorflow as tf
from rich.table import Table

import keras_kfc
from examples.data import ImageData

LOSS = "sparse_categorical_crossentropy"


@dataclasses.dataclass
class Run:
    """One training run.

    Attributes:
        family: Name of the optimizer's class.
        setting: What was set, as text.
        model: The trained model.
        start_up: Seconds until the first step was traced and compiled.
        iterations: Iterations at which the training loss was measured.
        seconds: Seconds of training until then.
        losses: The training losses.
        test_loss: Loss on held-out images after training.
        test_accuracy: Accuracy on held-out images after training.
    """

    family: str
    setting: str
    model: keras.Model
    start_up: float = 0.0
    iterations: list[int] = dataclasses.field(default_factory=list)
    seconds: list[float] = dataclasses.field(default_factory=list)
    losses: list[float] = dataclasses.field(default_factory=list)
    test_loss: float = float("nan")
    test_accuracy: float = float("nan")

    @property
    def final_loss(self) -> float:
        """The last training loss, infinite if training diverged."""
        return self.losses[-1] if np.isfinite(self.losses[-1]) else float("inf")

    def first_at(self, target: float) -> tuple[int, float] | None:
        """Iterations and seconds to the first measurement at or below a training loss."""
        for iteration, seconds, loss in zip(
            self.iterations, self.seconds, self.losses, strict=True
        ):
            if loss <= target:
                return iteration, seconds
        return None


class _LossCurve(keras.callbacks.Callback):
    """Records the training loss every few iterations, with the clock stopped."""

    def __init__(self, run: Run, data: ImageData, every: int):
        super().__init__()
        self._run, self._every = run, every
        self._images, self._labels = data.train_images[:10_000], data.train_labels[:10_000]
        self._iteration, self._seconds = 0, 0.0

    def measure(self) -> None:
        """Adds a point to the curve."""
        total = 0.0
        for first in range(0, len(self._images), 1000):
            chunk = slice(first, first + 1000)
            probabilities = self._run.model(self._images[chunk], training=False)
            losses = keras.losses.sparse_categorical_crossentropy(
                self._labels[chunk], probabilities
            )
            total += float(tf.reduce_sum(losses))
        self._run.iterations.append(self._iteration)
        self._run.seconds.append(self._seconds)
        self._run.losses.append(total / len(self._images))

    def on_train_batch_begin(self, batch, logs=None):
        self._begin = time.perf_counter()

    def on_train_batch_end(self, batch, logs=None):
        self._seconds += time.perf_counter() - self._begin
        self._iteration += 1
        if self._iteration % self._every == 0:
            self.measure()

    def on_train_end(self, logs=None):
        if self._run.iterations[-1] != self._iteration:
            self.measure()


def train(
    build: Callable[[], keras.Model],
    optimizer: keras.Optimizer,
    setting: str,
    data: ImageData,
    *,
    epochs: int,
    batch_size: int,
    every: int,
    seed: int,
) -> Run:
    """Trains one net with one optimizer.

    Args:
        build: Makes the net, with the same initial weights every time.
        optimizer: The optimizer.
        setting: What to call its setting.
        data: The data set.
        epochs: Number of epochs.
        batch_size: Mini-batch size.
        every: Iterations between measurements of the training loss.
        seed: Seed of the order of the images.

    Returns:
        The run.
    """
    model = build()
    if isinstance(optimizer, keras_kfc.KFC):
        keras_kfc.instrument(model)
    model.compile(optimizer=optimizer, loss=LOSS, metrics=["accuracy"])
    run = Run(type(optimizer).__name__, setting, model)

    def batches():
        images = tf.data.Dataset.from_tensor_slices((data.train_images, data.train_labels))
        return images.shuffle(len(data.train_images), seed=seed).batch(batch_size).prefetch(2)

    _start_up(run, batches())
    curve = _LossCurve(run, data, every)
    curve.measure()
    model.fit(batches(), epochs=epochs, callbacks=[curve])
    run.test_loss, run.test_accuracy = model.evaluate(
        data.test_images, data.test_labels, batch_size=1000, verbose=0
    )
    return run


def _start_up(run, batches):
    """Traces and compiles the training step by running it once, and undoes that step."""
    weights = run.model.get_weights()
    begin = time.perf_counter()
    optimizer = run.model.optimizer
    optimizer.build(run.model.trainable_variables)
    state = [variable.numpy() for variable in optimizer.variables]
    run.model.fit(batches, steps_per_epoch=1, verbose=0)
    run.start_up = time.perf_counter() - begin
    run.model.set_weights(weights)
    for variable, value in zip(optimizer.variables, state, strict=True):
        variable.assign(value)


def best(runs: Sequence[Run]) -> Run:
    """The run with the lowest final training loss."""
    return min(runs, key=lambda run: run.final_loss)


def table(runs: Sequence[Run], target: float) -> Table:
    """A table of runs.

    Args:
        runs: The runs, one for each row.
        target: Training loss for the columns that tell how soon it was reached.
    """
    result = Table(title="After training")
    result.add_column("optimizer", no_wrap=True)
    for heading in (
        "iterations",
        "seconds",
        "start-up\nseconds",
        "training\nloss",
        "held-out\nloss",
        "held-out\naccuracy",
        f"iterations\nto {target:.3g}",
        f"seconds\nto {target:.3g}",
    ):
        result.add_column(heading, justify="right")
    for run in runs:
        reached = run.first_at(target)
        result.add_row(
            f"{run.family}({run.setting})",
            f"{run.iterations[-1]:,}",
            f"{run.seconds[-1]:.1f}",
            f"{run.start_up:.1f}",
            f"{run.losses[-1]:.2g}",
            f"{run.test_loss:.3f}",
            f"{run.test_accuracy:.2%}",
            "never" if reached is None else f"{reached[0]:,}",
            "never" if reached is None else f"{reached[1]:.2f}",
        )
    return result


def draw(runs: Sequence[Run], path: pathlib.Path, title: str) -> None:
    """Draws training loss against iterations and against seconds into a PNG file."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), sharey=True, layout="constrained")
    for run, color in zip(runs, ("tab:blue", "tab:orange", "tab:green"), strict=False):
        for axis, horizontal in zip(axes, (run.iterations, run.seconds), strict=True):
            label = f"{run.family}({run.setting})"
            axis.plot(horizontal, run.losses, color=color, label=label, linewidth=2)
    for axis, name in zip(axes, ("iterations", "seconds of training"), strict=True):
        axis.set(xlabel=name, yscale="log")
        axis.grid(alpha=0.3, which="both")
        axis.set_xlim(left=0)
    axes[0].set_ylabel("training loss")
    axes[0].legend()
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
