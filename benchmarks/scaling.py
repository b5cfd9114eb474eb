"""Iterations to a training loss against the batch size, for KFC and tuned SGD, LARS and Adam.

Run as `python -m benchmarks.scaling --task DATA/NETWORK --data-dir DIR`; `--help` lists the
options. The paper's argument for large batches (Grosse & Martens 2016, on distributed
training): with less noise in the gradient, curvature is what limits the number of
iterations, so that KFC's keeps falling where SGD's no longer does. At each batch size the others
are tuned anew (`benchmarks.search`), starting from the learning rate of the size before, with three
values at least; a run for tuning ends when it has taken twice the iterations of the best one, or
one and a half times those of the size before, whichever is less. A second table projects seconds
on as many workers as the batch has parts of the smallest size (`benchmarks.projection`). Runs are
kept as those of `benchmarks.training` are; the tables go to `summary.md`, the curves to
`scaling.png`.
"""

import argparse
import dataclasses
import math
import pathlib
import statistics
from collections.abc import Mapping, Sequence

from benchmarks import curves, projection
from benchmarks.options import (
    add_common_options,
    check_optimizers,
    folder_of,
    progress_display,
    task_from,
)
from benchmarks.search import FAMILIES, FEWEST, number_in, search
from benchmarks.training import Budget, Experiment

# Iterations to the target for each seed, infinite where it was missed, by batch size, by
# optimizer.
Results = Mapping[str, Mapping[int, Sequence[float]]]


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the measurement."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_common_options(parser)
    parser.add_argument(
        "--optimizers",
        nargs="+",
        default=["KFC()", "SGD", "LARS", "Adam"],
        help=f'of {", ".join(FAMILIES)}, or a call such as "KFC()" (KFC(), SGD, LARS, Adam)',
    )
    sizes = [256, 1024, 4096, 16384]
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=sizes, help="(%(default)s)")
    parser.add_argument("--target", type=float, default=0.3, help="training loss (%(default)s)")
    parser.add_argument("--iterations", type=int, default=3000, help="budget (%(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="(1 2 3)")
    arguments = parser.parse_args(argv)
    check_optimizers(parser, arguments.optimizers)
    task = task_from(parser, arguments)
    results: dict[str, dict[int, list[float]]] = {name: {} for name in arguments.optimizers}
    chosen: dict[str, dict[int, str]] = {name: {} for name in arguments.optimizers}
    families = dict(FAMILIES)
    targets = [arguments.target]
    with progress_display() as progress:
        for batch_size in sorted(arguments.batch_sizes):
            folder = folder_of(arguments, batch_size)
            experiment = Experiment(
                task, batch_size, Budget(arguments.iterations), folder, progress
            )
            for name in arguments.optimizers:
                setting = name
                if name in families:
                    # More noise never takes fewer iterations.
                    before = [round(1.5 * min(hits[0], 1e9)) for hits in results[name].values()]
                    most = min([arguments.iterations, *before])
                    tuning = _Tuning(task, batch_size, arguments, folder, progress, most)
                    fewest = 3 if before else FEWEST
                    setting, _ = search(families[name], tuning.train, targets, fewest)
                    families[name] = dataclasses.replace(
                        families[name], start=number_in(families[name], setting)
                    )
                reached = []
                for seed in arguments.seeds:
                    (run,) = experiment.train([setting], seed, until=arguments.target)
                    hit = run.first_at(loss=arguments.target)
                    reached.append(math.inf if hit is None else run.iterations[hit])
                results[name][batch_size] = reached
                chosen[name][batch_size] = setting
    title = f"{task.name}: iterations to training loss {arguments.target:g}"
    folder = arguments.output / f"{arguments.task.replace('/', '-')}-scaling"
    folder.mkdir(parents=True, exist_ok=True)
    smallest = min(arguments.batch_sizes)
    settings = {name: by_size[smallest] for name, by_size in chosen.items()}
    most = projection.most_steps(results)
    steps = projection.seconds_of_steps(task, settings, most, smallest)
    numbers = {name: projection.numbers_exchanged(task, text) for name, text in settings.items()}
    tables = [
        ("By batch size", table_of(results, chosen, arguments.iterations)),
        (
            f"Milliseconds of a step at batch {smallest}",
            [
                {"steps": what, **{name: _milliseconds(all_[part]) for name, all_ in steps.items()}}
                for what, part in (("first 16", slice(16)), ("later ones", slice(16, None)))
            ],
        ),
        ("Projected seconds", projection.table_of(results, steps, numbers)),
    ]
    curves.write_tables(title, tables, folder)
    draw(results, title, arguments.iterations, folder / "scaling.png")


def _milliseconds(seconds: Sequence[float]) -> str:
    return f"{1e3 * statistics.mean(seconds):.3g}" if seconds else "-"


class _Tuning:
    """Trains with one setting after another, none for longer than is worth it."""

    def __init__(self, task, batch_size, arguments, folder, progress, most):
        self._task, self._batch_size, self._folder = task, batch_size, folder
        self._seed, self._target = arguments.seeds[0], arguments.target
        self._most, self._progress = most, progress

    def train(self, setting):
        budget = Budget(self._most)
        experiment = Experiment(self._task, self._batch_size, budget, self._folder, self._progress)
        run = experiment.train_for_tuning(setting, self._seed, self._target)
        hit = run.first_at(loss=self._target)
        if hit is not None:
            self._most = min(self._most, 2 * run.iterations[hit])
        return run


def table_of(results: Results, chosen: Mapping[str, Mapping[int, str]], budget: int) -> curves.Rows:
    """One row for each batch size, with the setting where there was a choice."""
    rows = []
    for batch_size in next(iter(results.values())):
        row = {"batch size": f"{batch_size:,}"}
        for name, by_size in results.items():
            missed = math.isinf(statistics.median(by_size[batch_size]))
            hits = by_size[batch_size]
            row[name] = f">{budget:,}" if missed else curves.spread(hits, "{:,.0f}")
            if chosen[name][batch_size] != name:
                row[f"{name} was"] = chosen[name][batch_size]
        rows.append(row)
    return rows


def draw(results: Results, title: str, budget: int, path: pathlib.Path) -> None:
    """Draws iterations against batch size, both on logarithmic axes, into a PNG file.

    A hollow triangle at the budget stands for a target that was missed.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib import ticker

    figure, axis = plt.subplots(figsize=(6, 4.2), layout="constrained")
    for number, (name, by_size) in enumerate(results.items()):
        medians = {size: statistics.median(hits) for size, hits in by_size.items()}
        reached = {size: hit for size, hit in medians.items() if math.isfinite(hit)}
        color = f"C{number}"
        axis.plot(list(reached), list(reached.values()), marker="o", label=name, color=color)
        missed = [size for size in medians if size not in reached]
        axis.plot(missed, [budget] * len(missed), "^", fillstyle="none", color=color)
    axis.set(xlabel="batch size", ylabel="iterations", title=title)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    sizes = sorted(next(iter(results.values())))
    axis.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axis.yaxis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.yaxis.set_major_formatter(ticker.StrMethodFormatter("{x:,.0f}"))
    axis.yaxis.set_minor_formatter(ticker.NullFormatter())
    axis.grid(alpha=0.3, which="both")
    axis.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    main()
