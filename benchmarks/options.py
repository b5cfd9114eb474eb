"""What `benchmarks.training` and `benchmarks.scaling` share of their command lines."""

import argparse
import pathlib
from collections.abc import Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from benchmarks.harness import OUTPUT
from benchmarks.runs import optimizer_of
from benchmarks.search import FAMILIES
from benchmarks.tasks import DATA, NETWORKS, Task, task_of
from examples.data import DataError


def progress_display() -> Progress:
    """A progress bar that counts iterations."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )


def add_common_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that say on what to train, and where results go."""
    parser.add_argument(
        "--task",
        default="fashion-mnist/conv",
        help=f"DATA/NETWORK, of {', '.join(DATA)} and {', '.join(NETWORKS)} (%(default)s)",
    )
    parser.add_argument("--data-dir", help="folder of the data's files; otherwise Keras downloads")
    parser.add_argument("--examples", type=int, help="number of training examples (all)")
    parser.add_argument(
        "--output", type=pathlib.Path, default=OUTPUT / "training", help="folder for results"
    )


def check_optimizers(parser: argparse.ArgumentParser, names: Sequence[str]) -> None:
    """Ends the program with a sentence if an optimizer is not known."""
    for name in names:
        if name not in FAMILIES:
            try:
                optimizer_of(name)
            except ValueError as error:
                parser.error(str(error))


def task_from(
    parser: argparse.ArgumentParser, arguments: argparse.Namespace, hold_out: int | None = None
) -> Task:
    """Loads the task that the options name, or ends the program with a sentence."""
    try:
        return task_of(arguments.task, arguments.data_dir, arguments.examples, hold_out)
    except (ValueError, DataError) as error:
        parser.error(str(error))


def folder_of(
    arguments: argparse.Namespace, batch_size: int, hold_out: int | None = None
) -> pathlib.Path:
    """Folder of the results of one task and batch size."""
    size = "" if arguments.examples is None else f"-{arguments.examples}"
    held = "" if hold_out is None else f"-{hold_out}-held-out"
    return arguments.output / f"{arguments.task.replace('/', '-')}{size}{held}-batch-{batch_size}"
