"""From trainings to a table: ratios of KFC to the best of the baselines."""

import dataclasses
import math
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table

from benchmarks.everyday.runs import Run

# A row may be this much worse than the best baseline and still count as equal.
EQUAL = 1.1


@dataclasses.dataclass
class Row:
    """One task at one batch size.

    Args:
        task: Name of the task.
        batch: The batch size.
        held_out: Whether the task was kept for the final check.
        kfc: KFC's runs, one for each seed.
        baselines: Runs of each baseline, by its name.
    """

    task: str
    batch: int
    held_out: bool
    kfc: Sequence[Run]
    baselines: Mapping[str, Sequence[Run]]

    @property
    def best(self) -> str:
        """The baseline with the lowest loss at the end, in the geometric mean over seeds."""
        return min(self.baselines, key=lambda name: mean([r.end for r in self.baselines[name]]))

    def best_of(self, family: str) -> float:
        """Loss at the end of a family's best learning rate, relative to KFC's."""
        ends = [
            mean([run.end for run in runs])
            for name, runs in self.baselines.items()
            if name.split("(")[0] == family
        ]
        return min(ends)

    def ratio(self, quantity: str) -> float:
        """KFC over the best baseline, geometric mean over seeds, of `end`, `area` or `test`."""
        ours = mean([getattr(run, quantity) for run in self.kfc])
        theirs = mean([getattr(run, quantity) for run in self.baselines[self.best]])
        return ours / theirs if theirs > 0 else math.nan

    @property
    def end(self) -> float:
        """KFC's loss at the end, geometric mean over seeds."""
        return mean([run.end for run in self.kfc])

    @property
    def diverged(self) -> int:
        """Number of KFC's runs that ended above their start."""
        return sum(run.diverged for run in self.kfc)


def mean(values: Sequence[float]) -> float:
    """Geometric mean; infinite where a value is not a positive number."""
    if any(value <= 0 or math.isnan(value) for value in values):
        return math.inf
    return math.exp(sum(map(math.log, values)) / len(values))


def print_table(rows: Sequence[Row]) -> None:
    """Prints a line for each task and batch size."""
    table = Table(title="KFC() against the best baseline: loss at the end, area, test loss")
    for heading in ("task", "batch", "KFC", "best baseline", "its loss", "end", "area", "test"):
        table.add_column(heading, justify="left" if heading.endswith("baseline") else "right")
    table.columns[0].justify = "left"
    for row in rows:
        table.add_row(
            row.task + ("*" if row.held_out else ""),
            str(row.batch),
            f"{row.end:.3g}" + (f" ({row.diverged} diverged)" if row.diverged else ""),
            row.best,
            f"{row.end / row.ratio('end'):.3g}",
            *(f"{row.ratio(quantity):.2f}" for quantity in ("end", "area", "test")),
        )
    table.caption = "* kept for the final check: no default was chosen by it"
    Console(width=130).print(table)


def summary(rows: Sequence[Row]) -> str:
    """One line: how many diverged, are within 1.1 times the best, are ahead."""
    ratios = [row.ratio("end") for row in rows]
    areas = [row.ratio("area") for row in rows]
    runs = sum(len(row.kfc) for row in rows)

    def share(condition: Sequence[bool]) -> str:
        return f"{sum(condition)} of {len(rows)} ({sum(condition) / len(rows):.0%})"

    return (
        f"{sum(row.diverged for row in rows)} of {runs} runs diverged; rows within {EQUAL} times "
        f"the best baseline: {share([r <= EQUAL for r in ratios])}; ahead: "
        f"{share([r < 1 for r in ratios])}; geometric mean of the ratios "
        f"{mean(ratios):.3f}, of the areas {mean(areas):.3f}"
    )
