"""Tables and picture of `benchmarks.distributed`."""

import json
from typing import Any

import matplotlib.pyplot as plt
from rich.console import Console
from rich.table import Table

from benchmarks.harness import OUTPUT, describe_machine


def show(measured: dict[str, Any], costs: dict[str, Any]) -> None:
    """Prints all tables, draws the picture, and writes both to `benchmarks/output/`.

    Args:
        measured: What two workers found.
        costs: The cost model's numbers.
    """
    console = Console(width=120)
    table = Table(title="Collective operations of a step: numbers of four bytes in each")
    for heading in ("optimizer", "parameters", "every step", "bytes", "when due"):
        table.add_column(heading)
    for name, own in measured["steps"].items():
        every = ", ".join(
            "?" if numbers is None else f"{numbers:,}" for _, numbers in own["every step"]
        )
        sizes = [numbers for _, numbers in own["every step"]]
        # How long gathered parts are is known when they are gathered.
        sent = f"{4 * sum(size or 0 for size in sizes):,}" + (" and more" if None in sizes else "")
        due = sum(own["when due"].values())
        table.add_row(name, f"{own['parameters']:,}", every, sent, str(due))
    console.print(table)
    for name, renewal in measured["renewals"].items():
        ratio = renewal["inverses"] / renewal["none"]
        console.print(
            f"A renewal, factors of {name}: {renewal['none']:.3f} s where each inverts all, "
            f"{renewal['inverses']:.3f} s shared by two, {ratio:.2f} times"
        )
    for name, by_speed in costs["extra seconds"].items():
        table = Table(title=f"{name}: mean seconds of a step beyond one of Adam")
        for heading in ("Gbit/s", "workers"):
            table.add_column(heading, justify="right")
        modes = list(next(iter(next(iter(by_speed.values())).values())))
        for mode in modes:
            table.add_column(mode, justify="right")
        for speed, by_workers in by_speed.items():
            for workers, seconds in by_workers.items():
                table.add_row(speed, workers, *(f"{seconds[mode]:.3f}" for mode in modes))
        console.print(table)
    console.print("Of these, the exchange of inverses, 8 workers, ms by Gbit/s:")
    for name, by_speed in costs["exchange of inverses, 8 workers"].items():
        parts = (f"{speed}: {1000 * seconds:.3f}" for speed, seconds in by_speed.items())
        console.print(f"  {name}", ", ".join(parts))
    draw(costs["extra seconds"])
    content = {"machine": describe_machine(), **measured, **costs}
    (OUTPUT / "distributed.json").write_text(json.dumps(content, indent=1) + "\n")


def draw(costs: dict[str, Any]) -> None:
    """A panel for each network and speed, a line for each mode, seconds over workers."""
    speeds = list(next(iter(costs.values())))
    figure, axes = plt.subplots(
        len(costs), len(speeds), figsize=(10, 8), sharex=True, sharey="row", squeeze=False
    )
    for row, (name, by_speed) in zip(axes, costs.items(), strict=True):
        for axis, speed in zip(row, speeds, strict=True):
            workers = [int(count) for count in by_speed[speed]]
            for mode in next(iter(by_speed[speed].values())):
                seconds = [own[mode] for own in by_speed[speed].values()]
                axis.plot(workers, seconds, marker="o", markersize=3, label=mode)
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
            axis.set_title(f"{name}, {speed} Gbit/s", fontsize=9)
        row[0].set_ylabel("seconds beyond Adam's step")
    for axis in axes[-1]:
        axis.set_xlabel("workers")
    axes[0][0].legend(fontsize=8)
    figure.tight_layout()
    OUTPUT.mkdir(parents=True, exist_ok=True)
    figure.savefig(OUTPUT / "distributed.png", dpi=120)
    plt.close(figure)
