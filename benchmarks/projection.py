"""Seconds that a training with large batches would take on many workers.

Each worker has the smallest of the batches that were measured, so that so many first steps take on
it what they took for that batch on this machine, with all renewals of factors and inverses that are
due in them; beyond that come the exchanges, by the speed of the network. Nothing is assumed to
overlap, and the tracing of the first step is left out.
"""

import statistics
import time
from collections.abc import Mapping, Sequence

import numpy as np

import keras_kfc
from benchmarks import curves
from benchmarks.cost_model import FACTORS_EVERY, GBITS, LATENCY, demands
from benchmarks.runs import Trainer, optimizer_of
from benchmarks.tasks import Task
from keras_kfc.optimizer.schedule import is_update_step

REPEATS = 3
# Steps that an optimizer takes before it is another one's turn.
TURN = 10


def seconds_of_steps(
    task: Task, settings: Mapping[str, str], most: Mapping[str, int], batch_size: int
) -> dict[str, list[float]]:
    """Seconds of each of the first steps, in turns, the median of several trainings.

    Args:
        task: What is trained.
        settings: The optimizers, by name.
        most: Number of steps, by name.
        batch_size: Mini-batch size.
    """
    found: dict[str, list[list[float]]] = {name: [] for name in settings}
    for _ in range(REPEATS):
        trainers = {name: Trainer(task, text, batch_size, 1) for name, text in settings.items()}
        seconds: dict[str, list[float]] = {name: [] for name in settings}
        for trainer in trainers.values():
            trainer.start()
        for turn in range(0, max(most.values()), TURN):
            for name, trainer in trainers.items():
                for step in range(turn, min(turn + TURN, most[name])):
                    begin = time.perf_counter()
                    trainer.train_to(step + 1)
                    seconds[name].append(time.perf_counter() - begin)
        for name, steps in seconds.items():
            found[name].append(steps)
    return {name: np.median(repeats, axis=0).tolist() for name, repeats in found.items()}


def numbers_exchanged(task: Task, setting: str) -> tuple[int, int]:
    """Numbers that all workers add up in each step, and whenever factors are due."""
    if not isinstance(optimizer_of(setting), keras_kfc.KFC):
        return task.build(1).count_params(), 0
    demand = demands(lambda: task.build(1))
    halves = sum(count * size * (size + 1) // 2 for size, count in demand["factors"].items())
    return demand["parameters"], halves


def exchange_seconds(numbers: tuple[int, int], steps: int, workers: int, gbits: float) -> float:
    """Seconds that the exchanges of so many first steps take.

    Numbers go round as in a ring, at the speed of the network; what an exchange takes to begin
    grows with the logarithm of the number of workers.

    Args:
        numbers: See `numbers_exchanged`, of four bytes each.
        steps: Number of steps.
        workers: Number of workers.
        gbits: Speed of the network in Gbit/s.
    """
    every, due = numbers
    wait = LATENCY * (workers - 1).bit_length()
    ring = 2 * (workers - 1) / workers * 4 / (gbits * 1e9 / 8)
    seconds = steps * (every * ring + wait)
    if due:
        period = FACTORS_EVERY
        seconds += (due * ring + wait) * sum(
            bool(is_update_step(step, period, period)) for step in range(steps)
        )
    return seconds


def table_of(
    results: Mapping[str, Mapping[int, Sequence[float]]],
    steps: Mapping[str, Sequence[float]],
    numbers: Mapping[str, tuple[int, int]],
) -> curves.Rows:
    """A row for each batch size and speed: seconds to the target for each optimizer.

    Args:
        results: Iterations to the target for each seed, by batch size, by optimizer.
        steps: See `seconds_of_steps`.
        numbers: See `numbers_exchanged`, by optimizer.
    """
    sizes = sorted(next(iter(results.values())))
    rows = []
    for size in sizes:
        workers = size // sizes[0]
        for gbits in GBITS:
            row = {"batch size": f"{size:,}", "workers": f"{workers}", "Gbit/s": f"{gbits}"}
            for name, by_size in results.items():
                count = statistics.median(by_size[size])
                if count == float("inf"):
                    row[name] = "-"
                    continue
                exchange = exchange_seconds(numbers[name], int(count), workers, gbits)
                row[name] = f"{sum(steps[name][: int(count)]) + exchange:.3g}"
            rows.append(row)
    return rows


def most_steps(results: Mapping[str, Mapping[int, Sequence[float]]]) -> dict[str, int]:
    """How many steps each optimizer took for the target, at the batch size where it took most."""
    return {
        name: max(
            (int(n) for hits in by_size.values() if (n := statistics.median(hits)) < float("inf")),
            default=0,
        )
        for name, by_size in results.items()
    }
