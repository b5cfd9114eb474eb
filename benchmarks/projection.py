"""Seconds that a training with large batches would take on many workers.

Each worker has the smallest of the batches that were measured, so that a step takes on it what
was measured for that batch on this machine; beyond that come the exchanges, by the speed of the
network. Nothing is assumed to overlap.
"""

import statistics
import time
from collections.abc import Mapping, Sequence

import keras_kfc
from benchmarks import curves
from benchmarks.distributed import FACTORS_EVERY, GBITS, LATENCY, demands
from benchmarks.runs import Trainer, optimizer_of
from benchmarks.tasks import Task

# Steps of a turn: as many as inverses are old when they are renewed.
TURN, TURNS = 20, 7


def seconds_of_steps(task: Task, settings: Mapping[str, str], batch_size: int) -> dict[str, float]:
    """Mean seconds of a step after the start, in turns, the median of several turns.

    Args:
        task: What is trained.
        settings: The optimizers, by name.
        batch_size: Mini-batch size.
    """
    trainers = {name: Trainer(task, text, batch_size, 1) for name, text in settings.items()}
    seconds: dict[str, list[float]] = {name: [] for name in trainers}
    for trainer in trainers.values():
        trainer.start()
    for turn in range(TURNS + 1):
        for name, trainer in trainers.items():
            begin = time.perf_counter()
            trainer.train_to(TURN * (turn + 1))
            # In the first turn factors are renewed more often.
            if turn:
                seconds[name].append((time.perf_counter() - begin) / TURN)
    return {name: statistics.median(values) for name, values in seconds.items()}


def numbers_exchanged(task: Task, setting: str) -> tuple[int, int]:
    """Numbers that all workers add up in each step, and whenever factors are due."""
    if not isinstance(optimizer_of(setting), keras_kfc.KFC):
        return task.build(1).count_params(), 0
    demand = demands(lambda: task.build(1))
    halves = sum(count * size * (size + 1) // 2 for size, count in demand["factors"].items())
    return demand["parameters"], halves


def exchange_seconds(numbers: tuple[int, int], workers: int, gbits: float) -> float:
    """Mean seconds that the exchanges of a step take in a ring.

    Args:
        numbers: See `numbers_exchanged`, of four bytes each.
        workers: Number of workers.
        gbits: Speed of the network in Gbit/s.
    """
    every, due = numbers
    wait = LATENCY * (workers - 1).bit_length()
    ring = 2 * (workers - 1) / workers * 4 / (gbits * 1e9 / 8)
    return every * ring + wait + ((due * ring + wait) / FACTORS_EVERY if due else 0.0)


def table_of(
    results: Mapping[str, Mapping[int, Sequence[float]]],
    steps: Mapping[str, float],
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
                step = steps[name] + exchange_seconds(numbers[name], workers, gbits)
                seconds = statistics.median(by_size[size]) * step
                row[name] = "-" if seconds == float("inf") else f"{seconds:.3g}"
            rows.append(row)
    return rows
