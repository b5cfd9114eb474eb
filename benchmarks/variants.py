"""Variants of KFC at equal iterations and at equal seconds.

`python -m benchmarks.variants` trains each task with each variant: the default, steps of a
quadratic model, second moments in the eigenbasis, both, curvature propagation, and both settings
of weight sharing. It prints the loss over the training set at the end, and what it was when the
default had ended, start-up included; geometric means over the seeds. All rates are constant.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf
from rich.console import Console
from rich.table import Table

import keras_kfc
from benchmarks.family_nets import FAMILIES
from benchmarks.harness import OUTPUT, describe_machine
from benchmarks.runs import optimizer_of
from examples.data import load_digits
from examples.nets import digits_autoencoder, digits_net

VARIANTS = (
    "KFC()",
    "KFC(step='quadratic')",
    "KFC(structure='eigenbasis')",
    "KFC(step='quadratic', structure='eigenbasis')",
    "KFC(fisher='curvature_propagation')",
    "KFC(weight_sharing='expand')",
    "KFC(weight_sharing='reduce')",
)
# How often the loss over the training set is computed, outside of the time; over so many examples
# of a larger one.
LOOKS, EXAMPLES = 20, 2000


@dataclasses.dataclass(frozen=True)
class VariantTask:
    """A network with data.

    Args:
        net: Makes it for a seed.
        data: Inputs and targets.
        loss: The loss.
        batch: Examples in a batch.
        iterations: Number of iterations.
    """

    net: Callable[[int], keras.Model]
    data: Callable[[], tuple[np.ndarray, np.ndarray]]
    loss: str
    batch: int
    iterations: int


def _pixels() -> tuple[np.ndarray, np.ndarray]:
    images = load_digits().train_images
    flat = images.reshape(len(images), -1)
    flat = (flat - flat.min()) / (flat.max() - flat.min())
    return flat, flat


def _digits() -> tuple[np.ndarray, np.ndarray]:
    data = load_digits()
    return data.train_images, data.train_labels


def _family(name: str, iterations: int) -> VariantTask:
    """One of the networks of `benchmarks.families`, on its data."""
    build, load = FAMILIES[name]

    def net(seed: int) -> keras.Model:
        keras.utils.set_random_seed(seed)
        return build()

    def data() -> tuple[np.ndarray, np.ndarray]:
        x, y, *_ = load(np.random.default_rng(0))
        return x, y

    return VariantTask(net, data, "sparse_categorical_crossentropy", 128, iterations)


TASKS = {
    "deep autoencoder, batch 1024": VariantTask(digits_autoencoder, _pixels, "mse", 1024, 200),
    "deep autoencoder, batch 128": VariantTask(digits_autoencoder, _pixels, "mse", 128, 300),
    "conv net, batch 256": VariantTask(
        digits_net, _digits, "sparse_categorical_crossentropy", 256, 100
    ),
    "resnet, batch norm, batch 128": _family("resnet, batch norm", 200),
    "vit, batch 128": _family("vit", 200),
}


def curve(task: VariantTask, setting: str, seed: int) -> list[tuple[float, float]]:
    """Trains; seconds and loss over the training set at each look.

    Args:
        task: The task.
        setting: The optimizer, as a call.
        seed: Of weights, batches and draws.
    """
    x, y = task.data()
    model = task.net(seed)
    keras_kfc.instrument(model)
    model.compile(optimizer_of(setting), task.loss)
    batches = tf.data.Dataset.from_tensor_slices((x, y)).shuffle(len(x), seed=seed)
    batches = iter(batches.repeat().batch(task.batch))
    each = task.iterations // LOOKS
    points, seconds = [], 0.0
    for _ in range(LOOKS):
        part = tf.data.Dataset.from_tensors(next(batches))
        for _ in range(each - 1):
            part = part.concatenate(tf.data.Dataset.from_tensors(next(batches)))
        begin = time.perf_counter()
        model.fit(part, verbose=0)
        seconds += time.perf_counter() - begin
        seen = x[:EXAMPLES], y[:EXAMPLES]
        loss = float(model.evaluate(*seen, batch_size=EXAMPLES, verbose=0))
        points.append((seconds, loss))
    return points


def at(points: Sequence[tuple[float, float]], seconds: float) -> float:
    """The loss at a time: that of the last look before, the first one's if there was none."""
    before = [loss for spent, loss in points if spent <= seconds]
    return before[-1] if before else points[0][1]


def summary(curves: dict[str, list[list[tuple[float, float]]]]) -> list[dict[str, Any]]:
    """A row for each variant.

    Args:
        curves: For each variant its curves, one for each seed; the first one is the default.
    """
    reference = next(iter(curves.values()))

    def mean(values: Sequence[float]) -> float:
        return float(np.exp(np.mean(np.log(np.maximum(values, 1e-30)))))

    return [
        {
            "variant": name,
            "loss": mean([points[-1][1] for points in own]),
            "loss at equal seconds": mean(
                [at(p, r[-1][0]) for p, r in zip(own, reference, strict=True)]
            ),
            "seconds": mean([points[-1][0] for points in own]),
        }
        for name, own in curves.items()
    ]


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.variants", description=__doc__)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--iterations", type=int, help="in place of each task's own")
    parser.add_argument("--output", type=pathlib.Path, default=OUTPUT / "variants.json")
    options = parser.parse_args(argv)
    console, results = Console(width=120), {}
    for name in options.tasks:
        task = TASKS[name]
        if options.iterations:
            task = dataclasses.replace(task, iterations=max(LOOKS, options.iterations))
        curves: dict[str, list[list[tuple[float, float]]]] = {v: [] for v in options.variants}
        # In turns, so that a slow spell hits all alike.
        for seed in options.seeds:
            for variant in options.variants:
                curves[variant].append(curve(task, variant, seed))
        rows = summary(curves)
        results[name] = {"rows": rows, "curves": curves}
        table = Table(title=f"{name}, {task.iterations} iterations")
        for column in rows[0]:
            table.add_column(column, justify="left" if column == "variant" else "right")
        for row in rows:
            table.add_row(*(v if isinstance(v, str) else f"{v:.3g}" for v in row.values()))
        console.print(table)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    document = {"machine": describe_machine(), "seeds": options.seeds, "tasks": results}
    options.output.write_text(json.dumps(document, indent=1))


if __name__ == "__main__":
    main()
