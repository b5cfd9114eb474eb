"""What the examples of the gallery share: a command line, runs to compare, and curves of them."""

import argparse
import dataclasses
import os
import pathlib
import time
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
from rich.console import Console
from rich.table import Table

OUTPUT = pathlib.Path(__file__).resolve().parent / "output"


@dataclasses.dataclass
class Run:
    """A training that is done.

    Args:
        name: What it is called in the table and the picture.
        model: The trained model.
        history: What `fit` returned, by name: a list of one number for each epoch.
        seconds: Seconds of `fit`, start-up included.
    """

    name: str
    model: keras.Model
    history: dict[str, list[float]]
    seconds: float


def parse(
    description: str | None, arguments: list[str] | None, epochs: int, name: str
) -> argparse.Namespace:
    """Reads the command line: `--epochs`, `--seed`, `--quick`, `--output`.

    Args:
        description: The script's docstring.
        arguments: The command line, or None for that of the process.
        epochs: Epochs by default; 1 for `--quick`.
        name: Name of the picture's file, without `.png`.

    Returns:
        The options, with `picture`, the file to draw to.
    """
    parser = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    parser.add_argument("--epochs", type=positive, default=epochs)
    parser.add_argument("--seed", type=int, default=1, help="of weights, batches and draws")
    parser.add_argument("--quick", action="store_true", help="one epoch, which shows nothing")
    parser.add_argument(
        "--output",
        type=pathlib.Path,
        default=OUTPUT,
        help="folder for the picture (default: examples/output)",
    )
    options = parser.parse_args(arguments)
    if options.quick:
        options.epochs = 1
    options.picture = options.output / f"{name}{'-quick' * options.quick}.png"
    return options


def positive(text: str) -> int:
    """Reads a positive integer from the command line."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer, received {text!r}")
    return int(text)


def timed(name: str, model: keras.Model, **fit: Any) -> Run:
    """Trains a compiled model.

    Args:
        name: Name of the run.
        model: The model.
        **fit: Arguments of `fit`.
    """
    begin = time.perf_counter()
    history = model.fit(verbose=0, **fit).history
    return Run(name, model, history, time.perf_counter() - begin)


def show(runs: list[Run], measures: dict[str, str], title: str) -> None:
    """Prints a table.

    Args:
        runs: A row each.
        measures: Headings by their names in the history; the last epoch's number is shown.
        title: Title of the table.
    """
    table = Table(title=title)
    table.add_column("")
    for heading in (*measures.values(), "seconds"):
        table.add_column(heading, justify="right")
    for run in runs:
        numbers = [f"{run.history[name][-1]:.4g}" for name in measures]
        table.add_row(run.name, *numbers, f"{run.seconds:.1f}")
    Console(width=110).print(table)


def draw_curves(axes: Any, runs: list[Run], measure: str, label: str, log: bool = True) -> None:
    """Draws one number of each run against epochs.

    Args:
        axes: Matplotlib axes.
        runs: A line each.
        measure: Its name in the history.
        label: What it is called in the picture.
        log: Whether its axis is logarithmic.
    """
    for run in runs:
        values = run.history[measure]
        axes.plot(range(1, len(values) + 1), values, marker=".", label=run.name)
    axes.set(xlabel="epoch", ylabel=label)
    if log:
        logarithmic(axes)
    axes.grid(True, alpha=0.3)
    axes.legend(fontsize="small")


def logarithmic(axes: Any) -> None:
    """Makes an axis logarithmic, with plain numbers beside it."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def figure(width: float, height: float) -> Any:
    """A matplotlib figure that needs no window."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def save(picture: Any, path: pathlib.Path) -> None:
    """Writes a picture and says where."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.savefig(path, dpi=110)
    print(f"Picture: {path}")
