"""Settings of KFC() and constants of its step rule against the defaults, on the everyday tasks.

`python -m benchmarks.everyday.constants --setting "KFC(damping=0.3)" --setting
steps.polyak._START=10` trains each task at the defaults and at each setting, with the same
weights and batches, and prints how losses at the end and areas under the curves compare. Other
optimizers can be settings, too: `--setting "Adam(cosine(0.01))"`. Tasks that are kept for the final
check are left out, or trained alone with `--held-out`.
"""

import argparse
import dataclasses
import functools
import json
import multiprocessing
import os
import pathlib
import statistics
from collections.abc import Sequence

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
from rich.console import Console
from rich.table import Table

from benchmarks.everyday import TASKS
from benchmarks.everyday.report import EQUAL, mean
from benchmarks.everyday.rows import other_constants, use_one_thread
from benchmarks.everyday.runs import Run, Trainer
from benchmarks.harness import OUTPUT, describe_machine
from benchmarks.runs import optimizer_of


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is to differ from the defaults.

    Args:
        optimizer: The call of the optimizer.
        constants: Names within keras_kfc and their values.
    """

    optimizer: str = "KFC()"
    constants: tuple[tuple[str, float], ...] = ()

    def __str__(self) -> str:
        parts = [] if self.optimizer == "KFC()" else [self.optimizer]
        parts += [f"{name}={value:g}" for name, value in self.constants]
        return " ".join(parts) or "defaults"


@dataclasses.dataclass(frozen=True)
class Job:
    """One task at one batch size, at all settings."""

    task: str
    batch: int
    steps: int
    seeds: tuple[int, ...]
    settings: tuple[Setting, ...]


@dataclasses.dataclass
class Trained:
    """What came of a job: for each setting a run for each seed."""

    task: str
    batch: int
    runs: list[list[Run]]


def trained(job: Job) -> Trained:
    """Trains one task at all settings."""
    runs = []
    for setting in job.settings:
        keras.backend.clear_session()
        with other_constants(dict(setting.constants)):
            make_optimizer = functools.partial(optimizer_of, setting.optimizer, 1, job.steps)
            trainer = Trainer(
                TASKS[job.task],
                job.batch,
                job.steps,
                make_optimizer,
                instrumented=setting.optimizer.startswith("KFC("),
            )
            runs.append([trainer.run(seed) for seed in job.seeds])
    return Trained(job.task, job.batch, runs)


def print_comparison(settings: Sequence[Setting], rows: Sequence[Trained]) -> None:
    """Prints a line for each setting: ratios to the defaults, over rows and seeds."""
    table = Table(title=f"Against the defaults, {len(rows)} rows")
    headings = ("end", "median", "lowest", "highest", f"< 1/{EQUAL}", f"> {EQUAL}", "area")
    table.add_column("setting")
    for heading in (*headings, "diverged"):
        table.add_column(heading, justify="right")
    for index, setting in enumerate(settings):
        ends = [_ratio(row, index, "end") for row in rows]
        areas = [_ratio(row, index, "area") for row in rows]
        diverged = sum(run.diverged for row in rows for run in row.runs[index])
        table.add_row(
            str(setting),
            *(f"{value:.3f}" for value in (mean(ends), statistics.median(ends))),
            *(f"{value:.2f}" for value in (min(ends), max(ends))),
            str(sum(end < 1 / EQUAL for end in ends)),
            str(sum(end > EQUAL for end in ends)),
            f"{mean(areas):.3f}",
            str(diverged),
        )
    Console(width=130).print(table)


def _ratio(row: Trained, index: int, quantity: str) -> float:
    ours, defaults = (
        mean([getattr(run, quantity) for run in runs]) for runs in (row.runs[index], row.runs[0])
    )
    return ours / defaults


def main() -> None:
    """Trains and prints."""
    arguments = _arguments()
    settings = (Setting(), *(_setting(parts) for parts in arguments.settings))
    jobs = [
        Job(name, batch, steps, tuple(arguments.seeds), settings)
        for name, task in TASKS.items()
        if task.held_out == arguments.held_out
        for batch, steps in zip(task.batches, task.steps, strict=True)
        if not arguments.batch_sizes or batch in arguments.batch_sizes
    ]
    context = multiprocessing.get_context("spawn")
    rows = []
    with context.Pool(arguments.processes, use_one_thread, maxtasksperchild=8) as pool:
        for row in pool.imap(trained, jobs):
            rows.append(row)
            ends = (f"{_ratio(row, index, 'end'):.2f}" for index in range(1, len(settings)))
            print(f"{row.task}, batch {row.batch}:", *ends, flush=True)
    print_comparison(settings, rows)
    content = {
        "machine": describe_machine(),
        "settings": [str(setting) for setting in settings],
        "rows": [dataclasses.asdict(row) for row in rows],
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(content, indent=1) + "\n")


def _setting(parts: Sequence[str]) -> Setting:
    calls = [part for part in parts if part.endswith(")")]
    constants = (part.split("=") for part in parts if part not in calls)
    return Setting(
        calls[0] if calls else "KFC()",
        tuple((name, json.loads(value)) for name, value in constants),
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.everyday.constants", description=__doc__
    )
    parser.add_argument(
        "--setting",
        dest="settings",
        nargs="+",
        action="append",
        required=True,
        metavar="CALL or MODULE.NAME=VALUE",
        help="a call of the optimizer, other values of constants, or both",
    )
    parser.add_argument("--held-out", action="store_true", help="tasks of the final check")
    parser.add_argument("--batch-sizes", type=int, nargs="*", default=[], metavar="SIZE")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--output", type=pathlib.Path, default=OUTPUT / "everyday/constants.json")
    return parser.parse_args()


if __name__ == "__main__":
    main()
