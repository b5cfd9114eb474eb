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
        For every optimizer the numbers over seeds of "iterations", "seconds" and "total",
        seconds with the first step (all infinite where the target was missed); how much of
        each was spent at the end of the run, "at least"; whether the median run "missed" the
        target and most runs "diverged"; the "ratio" of medians to those of the first
        optimizer, a lower bound where the target was missed, NaN where there is none; and
        the test accuracy or test loss at that measurement, "test".
    """
    rows: list[dict[str, Any]] = []
    for setting, of_setting in runs.items():
        row: dict[str, Any] = {name: [] for name in ("iterations", "seconds", "total", "test")}
        for run in of_setting:
            hit = run.first_at(loss=loss, accuracy=accuracy)
            row["iterations"].append(math.inf if hit is None else run.iterations[hit])
            row["seconds"].append(math.inf if hit is None else run.seconds[hit])
            row["total"].append(math.inf if hit is None else run.seconds[hit] + run.start_up)
            if hit is not None:
                row["test"].append((run.test_accuracies or run.test_losses)[hit])
        row["optimizer"] = setting
        row["missed"] = math.isinf(statistics.median(row["iterations"]))
        most = 2 * sum(run.diverged for run in of_setting) > len(of_setting)
        row["diverged"] = row["missed"] and most
        row["at least"] = {
            "iterations": statistics.median(run.iterations[-1] for run in of_setting),
            "seconds": statistics.median(run.seconds[-1] for run in of_setting),
            "total": statistics.median(run.seconds[-1] + run.start_up for run in of_setting),
        }
        row["ratio"] = {}
        for name in ("iterations", "seconds", "total"):
            ours = statistics.median((rows or [row])[0][name])
            theirs = row["at least"][name] if row["missed"] else statistics.median(row[name])
            known = 0 < ours < math.inf and not row["diverged"]
            row["ratio"][name] = theirs / ours if known else math.nan
        rows.append(row)
    return rows


def _target_table(rows: Sequence[Mapping[str, Any]]) -> Rows:
    shown = []
    for row in rows:
        cells = {"optimizer": row["optimizer"]}
        over = ">" if row["missed"] else ""
        for name, title, form in (
            ("iterations", "iterations", "{:,.0f}"),
            ("seconds", "seconds", "{:.1f}"),
            ("total", "with first step", "{:.1f}"),
        ):
            if row["diverged"]:
                cells[title] = "diverged"
            elif over:
                cells[title] = over + form.format(row["at least"][name])
            else:
                cells[title] = spread(row[name], form)
            ratio = row["ratio"][name]
            cells[f"{title} ×"] = "-" if math.isnan(ratio) else f"{over}{ratio:.1f}"
        cells["test there"] = f"{statistics.median(row['test']):.4f}" if row["test"] else "-"
        shown.append(cells)
    return shown


def _overview(runs: Runs) -> Rows:
    rows = []
    for setting, of_setting in runs.items():
        accurate = bool(of_setting[0].test_accuracies)
        best = [max(r.test_accuracies) if accurate else min(r.test_losses) for r in of_setting]
        per_step = [1000 * run.seconds[-1] / run.iterations[-1] for run in of_setting]
        rows.append(
            {
                "optimizer": setting,
                "iterations": spread([run.iterations[-1] for run in of_setting], "{:,.0f}"),
                "lowest training loss": spread([min(r.losses) for r in of_setting], "{:.4f}"),
                "best test accuracy" if accurate else "lowest test loss": spread(best, "{:.4f}"),
                "ms per step": spread(per_step, "{:.1f}"),
                "first step, s": spread([run.start_up for run in of_setting], "{:.1f}"),
            }
        )
    return rows


def spread(values: Sequence[float], form: str) -> str:
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
    tables.append(("Over whole runs", _overview(runs)))
    folder.mkdir(parents=True, exist_ok=True)
    notes = ["×: times the first row's. Seconds are those of training steps."]
    if any(len({r.session for r in of_seed}) > 1 for of_seed in zip(*runs.values(), strict=True)):
        notes.append(
            "Not all runs of a seed took turns in one session: their seconds compare less well."
        )
    write_tables(f"{title}: median of {_seeds(runs)} (lowest–highest)", tables, folder, notes)
    draw(runs, title, targets, folder / "curves.png")


def _seeds(runs):
    count = len(next(iter(runs.values())))
    return "1 seed" if count == 1 else f"{count} seeds"


def write_tables(
    title: str,
    tables: Sequence[tuple[str, Rows]],
    folder: pathlib.Path,
    notes: Sequence[str] = (),
) -> None:
    """Prints tables with a title and writes them as Markdown to `summary.md` in a folder."""
    console, lines = Console(width=150), [f"# {title}", *(f"\n{note}" for note in notes)]
    console.print(f"\n[bold]{title}[/bold]")
    for note in notes:
        console.print(note)
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
    from matplotlib import ticker

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
        axis.set_ylim(top=_after_the_start(runs))
        axis.yaxis.set_major_locator(ticker.LogLocator(subs=(1.0, 1.5, 2.0, 3.0, 5.0, 7.0)))
        axis.yaxis.set_minor_locator(ticker.NullLocator())
        axis.yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
        for target in targets:
            axis.axhline(target, color="black", linewidth=0.8, linestyle=":")
    if accuracy:
        best = max(max(r.test_accuracies) for of_setting in runs.values() for r in of_setting)
        axes[2].set_ylim(max(0.0, best - 0.08), min(1.0, best + 0.005))
    axes[0].legend(fontsize="small")
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _after_the_start(runs):
    """The highest loss of any run once a fiftieth of it is done."""
    losses = [
        next(loss for i, loss in zip(run.iterations, run.losses, strict=True) if i >= start)
        for of_setting in runs.values()
        for run in of_setting
        for start in [run.iterations[-1] / 50]
    ]
    return max((loss for loss in losses if math.isfinite(loss)), default=None)
