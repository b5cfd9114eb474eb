"""How much sooner KFC gets to the loss that a tuned baseline ends with.

`python -m benchmarks.sooner` trains each network of `benchmarks.families` with KFC for 300
iterations, and with the best baseline of that benchmark for as many seconds. Then it trains with
KFC for fewer iterations, or for more where KFC is behind, each time with a whole cosine schedule,
until two numbers of iterations lie around the baseline's loss. The seconds in between follow from
their logarithms. All seconds include the start-up.
"""

import argparse
import itertools
import json
import math
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.families import Run, train
from benchmarks.harness import OUTPUT, describe_machine

# What `benchmarks.families` found.
BEST = {
    "conv1d": "Muon(0.01)",
    "lstm": "Muon(0.03)",
    "mobilenet-like": "Adam(0.03)",
    "resnet, batch norm": "AdamW(0.03)",
    "resnet, group norm": "SGD(0.1, momentum=0.9)",
    "vit": "Adam(0.003)",
    "u-net": "Muon(0.01)",
    "text transformer": "AdamW(0.003)",
}
KFC = "KFC(cosine(0.03))"
STEP = math.sqrt(2)


def crossing(runs: Sequence[Run], target: float) -> float | None:
    """Seconds in which runs of different lengths come down to a loss; None where none is around it.

    Args:
        runs: The runs, in any order.
        target: The loss.
    """
    ordered = sorted(runs, key=lambda run: run.iterations)
    for short, long in itertools.pairwise(ordered):
        if short.loss > target >= long.loss:
            share = math.log(short.loss / target) / math.log(short.loss / long.loss)
            return short.seconds * (long.seconds / short.seconds) ** share
    return None


def search(
    run_of: Callable[[int], Run], first: Run, target: float, most: int, fewest: int = 20
) -> list[Run]:
    """Trains for fewer or for more iterations until two runs lie around a loss.

    Args:
        run_of: Trains for a number of iterations.
        first: A run that is known.
        target: The loss.
        most: No more iterations than these.
        fewest: No fewer than these.
    """
    runs = [first]
    factor = 1 / STEP if first.loss <= target else STEP
    while crossing(runs, target) is None:
        iterations = round(runs[-1].iterations * factor)
        if not fewest <= iterations <= most:
            break
        runs.append(run_of(iterations))
    return runs


def measure(family: str, seed: int, iterations: int, most: int) -> dict[str, Any]:
    """One network and one seed."""
    whole = train(family, KFC, seed, iterations)
    baseline = train(family, BEST[family], seed, iterations, whole.seconds)
    runs = search(lambda number: train(family, KFC, seed, number), whole, baseline.loss, most)
    seconds = crossing(runs, baseline.loss)
    result = {
        "family": family,
        "seed": seed,
        "baseline": baseline.setting,
        "loss": baseline.loss,
        "baseline's seconds": baseline.seconds,
        "seconds": seconds,
        "times sooner": None if seconds is None else baseline.seconds / seconds,
        "runs": [[run.iterations, run.seconds, run.loss, run.accuracy] for run in runs],
        "baseline's accuracy": baseline.accuracy,
    }
    print(result, flush=True)
    return result


def show(rows: Sequence[dict[str, Any]]) -> None:
    """A line for each network and seed, and the geometric mean."""
    table = Table(title="Seconds to the best baseline's loss, start-up included")
    names = ("family", "seed", "baseline", "loss", "baseline's seconds", "seconds", "times sooner")
    for name in names:
        table.add_column(name)
    for row in rows:
        table.add_row(
            *(f"{x:.3g}" if isinstance(x := row[name], float) else str(x) for name in names)
        )
    console = Console(width=120)
    console.print(table)
    known = [math.log(row["times sooner"]) for row in rows if row["times sooner"]]
    if known:
        mean = math.exp(sum(known) / len(known))
        console.print(f"Geometric mean of {len(known)} of {len(rows)}: {mean:.2f} times sooner")


def main() -> None:
    """Trains and prints."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sooner", description=__doc__)
    parser.add_argument("--families", nargs="+", default=list(BEST), choices=list(BEST))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--iterations", type=int, default=300)
    parser.add_argument("--most", type=int, default=1200, help="iterations of KFC")
    parser.add_argument("--output", type=pathlib.Path, default=OUTPUT / "sooner.json")
    arguments = parser.parse_args()
    rows = []
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    for family in arguments.families:
        for seed in arguments.seeds:
            rows.append(measure(family, seed, arguments.iterations, arguments.most))
            content = {"machine": describe_machine(), "rows": rows}
            arguments.output.write_text(json.dumps(content, indent=1) + "\n")
    show(rows)


if __name__ == "__main__":
    main()
