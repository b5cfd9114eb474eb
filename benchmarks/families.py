"""Families of networks, with KFC() and with tuned baselines, all with cosine schedules.

`python -m benchmarks.families` trains each network of `benchmarks.family_nets` with KFC for a
number of iterations, and with Adam, AdamW, Muon and SGD at the best of five learning rates each,
for as many iterations as they do in KFC's seconds (start-up included), or with `--budget
iterations` for as many. The best is chosen by the training loss of the first seed, in a part of the
budget with `--tuning`, and the kinds that are best of all train for the other seeds, too.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import time
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

RATES = {
    "Adam": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
    "AdamW": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
    "Muon": (1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
    "SGD": (1e-2, 3e-2, 1e-1, 3e-1, 1.0),
}
BATCH = 128
# Iterations whose seconds tell how long one takes, after the first few.
WARM, TIMED = 5, 20


@dataclasses.dataclass
class Run:
    """One training.

    Args:
        setting: The optimizer, as a call.
        iterations: Number of iterations.
        seconds: Seconds of training, with the start-up.
        start_up: Seconds of these until the first step had run.
        loss: Loss over the training set at the end.
        test_loss: Loss over the test set.
        accuracy: Accuracy there.
    """

    setting: str
    iterations: int
    seconds: float
    start_up: float
    loss: float
    test_loss: float
    accuracy: float


def train(
    family: str,
    setting: str,
    seed: int,
    iterations: int,
    seconds: float | None = None,
    exclude: tuple[str, ...] = (),
) -> Run:
    """Trains a network with a cosine schedule over the whole run.

    Args:
        family: Name of the network.
        setting: The call of the optimizer.
        seed: Seed of weights and batches.
        iterations: Number of iterations, unless seconds are given.
        seconds: Train as many iterations as are done in these, start-up included, or None.
        exclude: Names of Keras classes whose layers KFC leaves to its fallback rule.
    """
    build, load = FAMILIES[family]
    x, y, x_test, y_test = load(np.random.default_rng(seed))
    keras.backend.clear_session()
    keras.utils.set_random_seed(seed)
    model = build()
    if setting.startswith("KFC"):
        names = [layer.name for layer in _layers(model) if type(layer).__name__ in exclude]
        keras_kfc.instrument(model, exclude=names)
    optimizer = optimizer_of(setting, seed, iterations)
    scheduled = "cosine(" in setting
    rate = float(optimizer.learning_rate)
    model.compile(
        optimizer, "sparse_categorical_crossentropy", metrics=["accuracy"], jit_compile=False
    )
    data = tf.data.Dataset.from_tensor_slices((x, y)).cache().shuffle(len(x), seed=seed)
    times = [0.0]
    batches = iter(data.repeat().batch(BATCH, drop_remainder=True).prefetch(2))
    begin = times[0] = time.perf_counter()
    while len(times) <= iterations:
        done = len(times) - 1
        if seconds is not None and done == WARM + TIMED:
            each = (times[-1] - times[WARM]) / TIMED
            iterations = max(done, done + int((seconds - times[-1] + begin) / each))
        if not scheduled and (seconds is None or done >= WARM + TIMED):
            optimizer.learning_rate = rate * 0.5 * (1 + np.cos(np.pi * done / iterations))
        model.train_on_batch(*next(batches))
        times.append(time.perf_counter())
    loss, _ = model.evaluate(x, y, batch_size=500, verbose=0)
    test_loss, accuracy = model.evaluate(x_test, y_test, batch_size=500, verbose=0)
    return Run(
        setting, len(times) - 1, times[-1] - begin, times[1] - begin, loss, test_loss, accuracy
    )


def _layers(model: keras.Model) -> list[keras.Layer]:
    return list(model._flatten_layers(include_self=False))


def compare(family: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """KFC's runs, and those of the best baselines at their best learning rates, for all seeds."""
    exclude = tuple(arguments.exclude)

    def baseline(setting: str, seed: int, budget: Run, share: float = 1.0) -> Run:
        iterations = int(share * arguments.iterations)
        seconds = share * budget.seconds if arguments.budget == "seconds" else None
        run = train(family, setting, seed, iterations, seconds)
        print(family, seed, share, run, flush=True)
        return run

    ours = []
    for seed in arguments.seeds:
        ours.append(train(family, arguments.kfc, seed, arguments.iterations, exclude=exclude))
        print(family, seed, ours[-1], flush=True)
    tuned = {}
    for kind in arguments.baselines:
        suffix = ", momentum=0.9" if kind == "SGD" else ""
        settings = [f"{kind}({float(rate)!r}{suffix})" for rate in RATES[kind]]
        runs = [baseline(one, arguments.seeds[0], ours[0], arguments.tuning) for one in settings]
        tuned[kind] = min(runs, key=_loss)
    finalists = sorted(tuned, key=lambda kind: _loss(tuned[kind]))[: arguments.finalists]
    best: dict[str, list[Run]] = {kind: [] for kind in finalists}
    for seed, own in zip(arguments.seeds, ours, strict=True):
        for kind, runs in best.items():
            known = arguments.tuning == 1 and seed == arguments.seeds[0]
            runs.append(tuned[kind] if known else baseline(tuned[kind].setting, seed, own))
    return {"family": family, "kfc": ours, "baselines": best, "tuned": tuned}


def _loss(run: Run) -> float:
    return run.loss if run.loss == run.loss else np.inf


def print_table(rows: list[dict[str, Any]]) -> None:
    """A line for each family: losses and accuracies, means over seeds."""
    table = Table(title="KFC against the best baseline by training loss")
    headings = ("family", "KFC: loss", "accuracy", "seconds", "steps")
    for heading in (*headings, "best baseline", "loss", "accuracy", "best accuracy", "steps"):
        table.add_column(heading)
    for row in rows:
        ours, baselines = row["kfc"], row["baselines"]
        cells = [row["family"], f"{_mean(ours, 'loss'):.4f}", f"{_mean(ours, 'accuracy'):.4f}"]
        cells += [f"{_mean(ours, 'seconds'):.1f}", f"{_mean(ours, 'iterations'):.0f}"]
        if baselines:
            runs = min(baselines.values(), key=lambda own: _mean(own, "loss"))
            best = max(_mean(own, "accuracy") for own in baselines.values())
            cells += [runs[0].setting, f"{_mean(runs, 'loss'):.4f}"]
            cells += [f"{_mean(runs, 'accuracy'):.4f}", f"{best:.4f}"]
            cells.append(f"{_mean(runs, 'iterations'):.0f}")
        table.add_row(*cells)
    Console(width=150).print(table)


def _mean(runs: list[Run], field: str) -> float:
    return float(np.mean([getattr(run, field) for run in runs]))


def main() -> None:
    """Trains and prints."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.families", description=__doc__)
    parser.add_argument("--families", nargs="*", default=list(FAMILIES), choices=list(FAMILIES))
    parser.add_argument("--baselines", nargs="*", default=list(RATES), choices=list(RATES))
    parser.add_argument("--kfc", default="KFC(cosine(0.03))", help="the optimizer to compare")
    parser.add_argument("--exclude", nargs="*", default=[], help="Keras classes without a block")
    parser.add_argument("--iterations", type=int, default=300)
    parser.add_argument("--budget", choices=("seconds", "iterations"), default="seconds")
    parser.add_argument("--tuning", type=float, default=1.0, help="part of the budget")
    parser.add_argument("--finalists", type=int, default=4, help="baselines with all seeds")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--output", type=pathlib.Path, default=OUTPUT / "families.json")
    arguments = parser.parse_args()
    rows = []
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    for family in arguments.families:
        rows.append(compare(family, arguments))
        content = {"machine": describe_machine(), "budget": arguments.budget, "rows": rows}
        text = json.dumps(content, indent=1, default=dataclasses.asdict)
        arguments.output.write_text(text + "\n")
    print_table(rows)


if __name__ == "__main__":
    main()
