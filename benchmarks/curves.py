"""Tables and pictures of training runs."""

import math
import pathlib
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.runs import Run

Runs = Mapping[str, Sequence[Run]]
Rows = list[dict[str, str]]


def to_target(
    runs: Runs, loss: float | None = None, accuracy: float | None = None
) -> list[dict[str, Any]]:
    """How soon each optimizer reached a training loss or a test accuracy.

    Args:
        runs: The runs, one for each seed, under the setting of their optimizer; the first
            setting is the one that ratios are taken to.
        loss: The training loss.
        accuracy: The test accuracy, instead.

    Returns:
        For every optimizer the numbers over seeds of "iterations" and "seconds" (infinite
        where the target was missed), with their medians' ratios to those of the first
        optimizer, at least so much where a median is infinite; and the test "accuracy" or
        test loss at that measurement.
    """
    rows = []
    for setting, of_setting in runs.items():
        row: dict[str, Any] = {"optimizer": setting, "iterations": [], "seconds": [], "test": []}
        for run in of_setting:
            hit = run.first_at(loss=loss, accuracy=accuracy)
            row["iterations"].append(math.inf if hit is None else run.iterations[hit])
            row["seconds"].append(math.inf if hit is None else run.seconds[hit])
            if hit is not None:
                row["test"].append((run.test_accuracies or run.test_losses)[hit])
        for name, spent in (("iterations", "iterations"), ("seconds", "seconds")):
            row[f"{name} at least"] = statistics.median(getattr(r, spent)[-1] for r in of_setting)
        rows.append(row)
    for row in rows:
        for name in ("iterations", "seconds"):
            ours, theirs = (statistics.median(r[name]) for r in (rows[0], row))
            missed = math.isinf(theirs)
            theirs = row[f"{name} at least"] if missed else theirs
            row[f"{name} ratio"] = math.nan if math.isinf(ours) else theirs / ours
            row[f"{name} missed"] = missed
    return rows


def _target_table(rows: Sequence[Mapping[str, Any]]) -> Rows:
    shown = []
    for row in rows:
        cells = {"optimizer": row["optimizer"]}
        for name, form in (("iterations", "{:,.0f}"), ("seconds", "{:.1f}")):
            over = ">" if row[f"{name} missed"] else ""
            if over:
                cells[name] = over + form.format(row[f"{name} at least"])
            else:
                cells[name] = _spread(row[name], form)
            ratio = row[f"{name} ratio"]
            cells["x" if name == "iterations" else "x "] = (
                "-" if math.isnan(ratio) else f"{over}{ratio:.1f}"
            )
        cells["test there"] = f"{statistics.median(row['test']):.4f}" if row["test"] else "-"
        shown.append(cells)
    return shown


def _overview(runs: Runs) -> Rows:
    rows = []
    for setting, of_setting in runs.items():
        best = [
            max(r.test_accuracies) if r.test_accuracies else min(r.test_losses) for r in of_setting
        ]
        name = "best test accuracy" if of_setting[0].test_accuracies else "lowest test loss"
        per_step = [1000 * run.seconds[-1] / run.iterations[-1] for run in of_setting]
        rows.append(
            {
                "optimizer": setting,
                "lowest training loss": _spread([min(r.losses) for r in of_setting], "{:.4f}"),
                name: _spread(best, "{:.4f}"),
                "ms per step": _spread(per_step, "{:.1f}"),
                "first step, s": _spread([run.start_up for run in of_setting], "{:.1f}"),
            }
        )
    return rows


def _spread(values: Sequence[float], form: str) -> str:
    """Median, and the lowest and highest where they differ."""
    low, middle, high = (
        form.format(value) if math.isfinite(value) else "never"
        for value in (min(values), statistics.median(values), max(values))
    )
    return middle if low == high else f"{middle} ({low}–{high})"


def report(
    runs: Runs,
    title: str,
    targets: Sequence[float],
    accuracies: Sequence[float],
    folder: pathlib.Path,
) -> None:
    """Prints tables, and writes them and the curves to `summary.md` and `curves.png`.

    Args:
        runs: The runs; see `to_target`.
        title: What was trained.
        targets: Training losses to reach.
        accuracies: Test accuracies to reach.
        folder: Folder for the files.
    """
    tables = [
        (f"To training loss {target:g}", _target_table(to_target(runs, loss=target)))
        for target in targets
    ]
    tables += [
        (f"To test accuracy {accuracy:g}", _target_table(to_target(runs, accuracy=accuracy)))
        for accuracy in accuracies
    ]
    budgets = sorted({of_setting[0].iterations[-1] for of_setting in runs.values()})
    tables.append((f"Within {max(budgets):,} iterations", _overview(runs)))
    folder.mkdir(parents=True, exist_ok=True)
    write_tables(f"{title}: median of {_seeds(runs)} (lowest–highest)", tables, folder)
    draw(runs, title, targets, folder / "curves.png")


def _seeds(runs):
    count = len(next(iter(runs.values())))
    return "1 seed" if count == 1 else f"{count} seeds"


def write_tables(title: str, tables: Sequence[tuple[str, Rows]], folder: pathlib.Path) -> None:
    """Prints tables with a title and writes them as Markdown to `summary.md` in a folder."""
    console, lines = Console(width=140), [f"# {title}"]
    console.print(f"\n[bold]{title}[/bold]")
    for heading, rows in tables:
        shown = Table(title=heading)
        for column in rows[0]:
            shown.add_column(column, justify="left" if column == "optimizer" else "right")
        for row in rows:
            shown.add_row(*row.values())
        console.print(shown)
        lines += ["", f"## {heading}", "", f"| {' | '.join(rows[0])} |"]
        lines.append(f"| --- |{' ---: |' * (len(rows[0]) - 1)}")
        lines += [f"| {' | '.join(row.values())} |" for row in rows]
    path = folder / "summary.md"
    path.write_text("\n".join(lines) + "\n")
    console.print(f"Written to {folder}", soft_wrap=True)


def draw(runs: Runs, title: str, targets: Sequence[float], path: pathlib.Path) -> None:
    """Draws training loss against iterations and seconds, and test accuracy or loss.

    Args:
        runs: The runs; every seed is drawn.
        title: Title of the picture.
        targets: Training losses to mark.
        path: The PNG file.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(13, 4.2), layout="constrained")
    accuracy = bool(next(iter(runs.values()))[0].test_accuracies)
    panels: list[tuple[str, str, Callable[[Run], tuple[Sequence[float], Sequence[float]]]]] = [
        ("iterations", "training loss", lambda run: (run.iterations, run.losses)),
        ("seconds of training", "training loss", lambda run: (run.seconds, run.losses)),
    ]
    if accuracy:
        panels.append(
            ("seconds of training", "test accuracy", lambda r: (r.seconds, r.test_accuracies))
        )
    else:
        panels.append(
            ("seconds of training", "test loss", lambda run: (run.seconds, run.test_losses))
        )
    for axis, (horizontal, vertical, points) in zip(axes, panels, strict=True):
        for number, (setting, of_setting) in enumerate(runs.items()):
            for seed, run in enumerate(of_setting):
                axis.plot(
                    *points(run),
                    color=f"C{number}",
                    label=None if seed else setting,
                    linewidth=2.2 if number == 0 else 1.2,
                    alpha=0.9 if number == 0 else 0.7,
                )
        axis.set(xlabel=horizontal, ylabel=vertical)
        axis.set_xlim(left=0)
        axis.grid(alpha=0.3, which="both")
    for axis in axes[:2]:
        axis.set_yscale("log")
        for target in targets:
            axis.axhline(target, color="black", linewidth=0.8, linestyle=":")
    if accuracy:
        best = max(max(r.test_accuracies) for of_setting in runs.values() for r in of_setting)
        axes[2].set_ylim(max(0.0, best - 0.08), min(1.0, best + 0.005))
    axes[0].legend(fontsize="small")
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    plt.close(figure)
