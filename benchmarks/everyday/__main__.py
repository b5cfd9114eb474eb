"""Command line of the table of everyday tasks."""

import argparse
import dataclasses
import json
import multiprocessing
import os
import pathlib

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from benchmarks.everyday import TASKS
from benchmarks.everyday.report import print_table, summary
from benchmarks.everyday.rows import Job, row_of, use_one_thread
from benchmarks.harness import OUTPUT, describe_machine


def main() -> None:
    """Trains what is missing, and prints the table."""
    arguments = _arguments()
    constants = {name: json.loads(value) for name, value in arguments.constants}
    jobs = [
        Job(name, batch, steps, arguments.kfc, tuple(arguments.seeds), arguments.output, constants)
        for name, task in TASKS.items()
        if (not arguments.tasks or name in arguments.tasks)
        and (arguments.part == "all" or task.held_out == (arguments.part == "held-out"))
        for batch, steps in zip(task.batches, task.steps, strict=True)
        if not arguments.batch_sizes or batch in arguments.batch_sizes
    ]
    # Not forked, which TensorFlow does not bear.
    context = multiprocessing.get_context("spawn")
    table = []
    with context.Pool(arguments.processes, use_one_thread, maxtasksperchild=8) as pool:
        for done in pool.imap(row_of, jobs):
            table.append(done)
            print(f"{done.task}, batch {done.batch}: {done.ratio('end'):.3f}", flush=True)
    print_table(table)
    print(summary(table))
    content = {
        "machine": describe_machine(),
        "kfc": arguments.kfc,
        "constants": constants,
        "summary": summary(table),
        "rows": [dataclasses.asdict(row) for row in table],
    }
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "table.json").write_text(json.dumps(content, indent=1) + "\n")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.everyday", description="KFC() on everyday tasks."
    )
    parser.add_argument("--tasks", nargs="*", default=[], choices=list(TASKS), metavar="TASK")
    parser.add_argument("--part", choices=("all", "tuning", "held-out"), default="all")
    parser.add_argument("--batch-sizes", type=int, nargs="*", default=[], metavar="SIZE")
    parser.add_argument("--kfc", default="KFC()", help="the call of the optimizer to compare")
    parser.add_argument(
        "--constant",
        dest="constants",
        nargs=2,
        action="append",
        default=[],
        metavar=("MODULE.NAME", "VALUE"),
        help="another value for a constant of keras_kfc, such as steps.polyak._DECAY 0.9",
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument(
        "--output",
        type=pathlib.Path,
        default=OUTPUT / "everyday",
        help="folder of the result; baselines that are in it are not trained again",
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
