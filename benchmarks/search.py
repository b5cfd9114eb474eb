"""Learning rates for the baselines: each optimizer is tuned by the same search.

The search starts with three neighbours of the series 1, 2, 5, 10, 20, ... and goes on
beyond the edge that the best of them lies at, until the best has a worse neighbour on either
side and at least five values were tried. KFC is searched likewise over `polyak_scaling`, which sets
the size of its steps; its learning rate is only an upper limit.

LARS is for large batches: `benchmarks.scaling` has it. Keras's Muon treats matrices as Muon does
and all else, so the kernels of convolutions, as AdamW does; it is used as it stands.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks.runs import Run


@dataclasses.dataclass(frozen=True)
class Family:
    """An optimizer with one number to tune.

    Args:
        template: Its call, with `{}` for the number.
        start: The number that the search starts around, one of 1, 2, 5, 10, ...
    """

    template: str
    start: float


FEWEST = 5
FAMILIES: Mapping[str, Family] = {
    "KFC-tuned": Family("KFC(polyak_scaling={})", 1.0),
    "SGD": Family("SGD({}, momentum=0.9, nesterov=True)", 0.02),
    "Adam": Family("Adam({})", 0.002),
    "AdamW": Family("AdamW({})", 0.002),
    "Muon": Family("Muon({})", 0.002),
    "LARS": Family("LARS({}, momentum=0.9)", 5.0),
}


def number_in(family: Family, setting: str) -> float:
    """The number that a family's template was filled with."""
    before, after = family.template.split("{}")
    return float(setting.removeprefix(before).removesuffix(after))


def number_of(index: int) -> float:
    """A number of the series 1, 2, 5, 10, 20, ...: the one of index 0 is 1."""
    return float(f"{(1, 2, 5)[index % 3]}e{index // 3}")


def index_of(number: float) -> int:
    """The index of a number of the series.

    Raises:
        ValueError: If it is not in the series.
    """
    exponent = math.floor(math.log10(number) + 1e-9)
    digit = round(number / 10**exponent, 6)
    if digit not in (1, 2, 5):
        raise ValueError(
            f"Argument `number` must be 1, 2 or 5 times a power of 10. Received: number={number}"
        )
    return 3 * exponent + (1, 2, 5).index(int(digit))


def score(run: Run, targets: Sequence[float]) -> tuple[float, ...]:
    """What runs are compared by, lower is better.

    The number of targets that were missed, then the iterations to the last one that was
    reached, then the last training loss.
    """
    reached = [run.iterations[i] for t in targets if (i := run.first_at(loss=t)) is not None]
    loss = math.inf if run.diverged else run.losses[-1]
    return len(targets) - len(reached), max(reached, default=0), loss


def search(
    family: Family,
    train: Callable[[str], Run],
    targets: Sequence[float],
    fewest: int = FEWEST,
) -> tuple[str, list[dict[str, Any]]]:
    """Tunes an optimizer.

    Args:
        family: The optimizer.
        train: Trains with a setting.
        targets: Training losses to reach, the last one the lowest.
        fewest: Number of values that are tried at least.

    Returns:
        The best setting, and for every setting tried a row with the iterations to each
        target (None where it was missed) and the last training loss.
    """
    runs: dict[int, Run] = {}
    start = index_of(family.start)
    wanted = [start - 1, start, start + 1]
    while True:
        for index in wanted:
            if index not in runs:
                runs[index] = train(family.template.format(number_of(index)))
        best = min(runs, key=lambda index: score(runs[index], targets))
        wanted = [best - 1, best + 1]
        if all(index in runs for index in wanted):
            if len(runs) >= fewest:
                break
            # Beyond the better of the two edges.
            low, high = min(runs), max(runs)
            better = score(runs[low], targets) < score(runs[high], targets)
            wanted = [low - 1 if better else high + 1]
    grid = []
    for _, run in sorted(runs.items()):
        hits = [run.first_at(loss=target) for target in targets]
        grid.append(
            {
                "setting": run.setting,
                "targets": list(targets),
                "iterations": [None if hit is None else run.iterations[hit] for hit in hits],
                "last loss": None if run.diverged else run.losses[-1],
                "last iteration": run.iterations[-1],
            }
        )
    return runs[best].setting, grid
