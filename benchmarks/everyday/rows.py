"""Rows of the table: all trainings of one task at one batch size, in a process of its own."""

import contextlib
import dataclasses
import importlib
import json
import logging
import pathlib
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import keras
import tensorflow as tf

from benchmarks.everyday import TASKS
from benchmarks.everyday.report import Row
from benchmarks.everyday.runs import Run, Trainer
from benchmarks.everyday.task import Task
from benchmarks.runs import optimizer_of

RATES = {
    "Adam": (3e-4, 1e-3, 3e-3, 1e-2),
    "AdamW": (3e-4, 1e-3, 3e-3, 1e-2),
    "SGD": (3e-3, 1e-2, 3e-2, 1e-1),
}


@dataclasses.dataclass(frozen=True)
class Job:
    """What a row is made of.

    Args:
        task: Name of the task.
        batch: Batch size.
        steps: Number of steps.
        kfc: The call of the optimizer to compare.
        seeds: Seeds of weights and batches.
        output: Folder of the results.
        constants: Constants of modules of keras_kfc that are to have other values, such as
            `{"steps.polyak._DECAY": 0.9}`.
    """

    task: str
    batch: int
    steps: int
    kfc: str
    seeds: tuple[int, ...]
    output: pathlib.Path
    constants: Mapping[str, float]


def use_one_thread() -> None:
    """Sets up a worker: a thread for each, since the nets are too small for more."""
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    logging.getLogger("keras_kfc").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*shuffle=True.*")


def row_of(job: Job) -> Row:
    """Trains baselines, unless they are in the folder, and KFC."""
    task = TASKS[job.task]
    keras.backend.clear_session()
    baselines: dict[str, list[Run]] = {}
    for family in RATES:
        baselines.update(_baseline(task, job, family))
    with other_constants(job.constants):
        trainer = Trainer(
            task,
            job.batch,
            job.steps,
            lambda: optimizer_of(job.kfc, 1, job.steps),
            instrumented=True,
        )
        runs = [trainer.run(seed) for seed in job.seeds]
    return Row(job.task, job.batch, task.held_out, runs, baselines)


@contextlib.contextmanager
def other_constants(values: Mapping[str, float]) -> Iterator[None]:
    """Gives module constants other values for the time being."""
    with contextlib.ExitStack() as stack:
        for path, value in values.items():
            module, name = path.rsplit(".", 1)
            owner = importlib.import_module(f"keras_kfc.{module}")
            stack.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, value)
        yield


def _baseline(task: Task, job: Job, family: str) -> dict[str, list[Run]]:
    """Runs of one optimizer at all its learning rates, from the file where they are there."""
    safe = "".join(letter if letter.isalnum() else "-" for letter in task.name)
    path = job.output / "baselines" / f"{safe}-{job.batch}-{family}.json"
    known: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    wanted = {"steps": job.steps, "rates": list(RATES[family])}
    if {key: known.get(key) for key in wanted} != wanted or not (
        set(job.seeds) <= set(known["seeds"])
    ):
        options = {"momentum": 0.9} if family == "SGD" else {}
        kind = getattr(keras.optimizers, family)
        trainer = Trainer(
            task, job.batch, job.steps, lambda: kind(0.001, **options), instrumented=False
        )
        known = {
            **wanted,
            "seeds": list(job.seeds),
            "runs": {
                f"{family}({rate:g})": [
                    dataclasses.asdict(trainer.run(seed, rate)) for seed in job.seeds
                ]
                for rate in RATES[family]
            },
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(known))
    return {
        name: [Run(**runs[known["seeds"].index(seed)]) for seed in job.seeds]
        for name, runs in known["runs"].items()
    }
