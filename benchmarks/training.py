"""Training with KFC against tuned baselines, in iterations and in seconds.

Run as `python -m benchmarks.training --task DATA/NETWORK --data-dir DIR`; `--help` lists the
options. First every baseline is tuned on the first seed (`benchmarks.search`). Then, seed by
seed, all optimizers train from the same initial weights on the same batches, taking turns
of a few steps, so that a machine that slows down slows all alike. The clock runs during
training steps only. Each run is a JSON file under `--output`; what is there already
is not run again. Tables go to the screen and to `summary.md`, curves to `curves.png`.
"""

import argparse
import dataclasses
import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np
from rich.progress import Progress

from benchmarks import curves
from benchmarks.harness import describe_machine
from benchmarks.options import (
    add_common_options,
    check_optimizers,
    folder_of,
    progress_display,
    task_from,
)
from benchmarks.runs import Run, Trainer, schedule
from benchmarks.search import FAMILIES, search
from benchmarks.tasks import Task

# What the tables tell the iterations and seconds to: training losses, and test accuracies.
TARGETS = {"autoencoder": (0.3, 0.285), "small-autoencoder": (0.18, 0.15)}
CLASSIFIER_TARGETS = (0.25, 0.15)
ACCURACIES = {
    "digits": (0.95, 0.98),
    "fashion-mnist": (0.88, 0.9),
    "mnist": (0.98, 0.99),
    "cifar-10": (0.6, 0.7),
    "svhn": (0.85, 0.9),
}
# Steps of one turn.
TURN = 20


@dataclasses.dataclass(frozen=True)
class Budget:
    """What a run may use up.

    Args:
        iterations: Number of iterations.
        seconds: Seconds of training, or None for no limit.
        tuning_iterations: Number of iterations while settings are tuned, or None for the same.
        until: Training loss at which a run ends early, or None.
    """

    iterations: int
    seconds: float | None = None
    tuning_iterations: int | None = None
    until: float | None = None

    def for_tuning(self, until: float) -> "Budget":
        """The budget of a run that a setting is chosen by, which a target ends."""
        return Budget(self.tuning_iterations or self.iterations, self.seconds, None, until)

    @property
    def text(self) -> str:
        """What the name of a file tells of it."""
        parts = [f"{self.iterations}-iterations"]
        if self.seconds is not None:
            parts.append(f"{self.seconds:g}-seconds")
        if self.until is not None:
            parts.append(f"until-{self.until:g}")
        return "-".join(parts)


class Experiment:
    """Trains on one task and keeps every run in a file.

    Args:
        task: The task.
        batch_size: Mini-batch size.
        budget: What each run may use up.
        folder: Folder of the files.
        progress: Progress display.
    """

    def __init__(
        self, task: Task, batch_size: int, budget: Budget, folder: pathlib.Path, progress: Progress
    ):
        self._task, self._batch_size, self._budget = task, batch_size, budget
        self._folder, self._progress = folder, progress
        self._machine = describe_machine()

    def tune(self, name: str, seed: int, targets: Sequence[float]) -> tuple[str, list[Any]]:
        """Finds the best setting of an optimizer, and the whole grid; see `search`."""

        def train(setting: str) -> Run:
            return self.train_for_tuning(setting, seed, targets[-1])

        return search(FAMILIES[name], train, targets)

    def train_for_tuning(self, setting: str, seed: int, until: float) -> Run:
        """Trains with one optimizer until a training loss, measured less often."""
        (run,) = self._train([setting], seed, "grid", self._budget.for_tuning(until), 1.25, {})
        return run

    def train(
        self,
        settings: Sequence[str],
        seed: int,
        grids: Mapping[str, list[Any]] | None = None,
        until: float | None = None,
    ) -> list[Run]:
        """Trains with several optimizers in turns, except those whose run is kept already.

        Args:
            settings: The optimizers.
            seed: The seed.
            grids: The grid that a setting was chosen from, to be kept with its run.
            until: Training loss at which runs end, if not that of the budget.

        Returns:
            The runs, one for each setting.
        """
        budget = self._budget
        if until is not None:
            budget = dataclasses.replace(budget, until=until)
        return self._train(settings, seed, "runs", budget, 1.1, grids or {})

    def _train(self, settings, seed, part, budget, growth, grids):
        paths = {
            setting: self._folder / part / f"{_slug(setting)}-seed-{seed}-{budget.text}.json"
            for setting in settings
        }
        missing = [setting for setting, path in paths.items() if not path.exists()]
        trainers = [Trainer(self._task, setting, self._batch_size, seed) for setting in missing]
        if trainers:
            _warm_up()
        for trainer in trainers:
            trainer.start()
        title = missing[0] if len(missing) == 1 else f"seed {seed}, {len(missing)} optimizers"
        marks = set(schedule(budget.iterations, growth)[1:])
        turns = sorted(marks | set(range(TURN, budget.iterations, TURN))) if trainers else []
        bar = self._progress.add_task(title, total=budget.iterations) if turns else None
        active = trainers
        for number, turn in enumerate(turns):
            # Each starts as often as any other.
            shift = number % len(active)
            for trainer in active[shift:] + active[:shift]:
                trainer.train_to(turn)
                if turn in marks:
                    trainer.measure()
            if bar is not None:
                self._progress.update(bar, completed=turn)
            if turn not in marks:
                continue
            for trainer in active:
                if turn == turns[-1] or _done(trainer.run, budget):
                    limits = dataclasses.asdict(budget)
                    path = paths[trainer.run.setting]
                    trainer.run.save(path, machine=self._machine, budget=limits)
            active = [trainer for trainer in active if not _done(trainer.run, budget)]
            if not active:
                break
        if bar is not None:
            self._progress.remove_task(bar)
        for setting, grid in grids.items():
            content = json.loads(paths[setting].read_text())
            paths[setting].write_text(json.dumps({**content, "grid": grid}) + "\n")
        return [Run.load(path) for path in paths.values()]


def _warm_up():
    """Lets TensorFlow do what it does once in a process, before a first step is timed."""
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    model.train_on_batch(np.zeros((1, 1)), np.zeros((1, 1)))


def _done(run, budget):
    return (
        run.diverged
        or (budget.seconds is not None and run.seconds[-1] >= budget.seconds)
        or (budget.until is not None and run.losses[-1] <= budget.until)
    )


def _slug(setting):
    return re.sub(r"[^\w.]+", "-", setting).strip("-")


def compare(
    experiment: Experiment,
    optimizers: Sequence[str],
    seeds: Sequence[int],
    targets: Sequence[float],
) -> dict[str, list[Run]]:
    """Tunes what is to be tuned, and trains with all optimizers for every seed.

    Args:
        experiment: Where to train.
        optimizers: Keys of `FAMILIES`, or settings such as `KFC()`.
        seeds: Seeds; the first one is tuned on.
        targets: Training losses, the last one the lowest.

    Returns:
        For every optimizer, under the setting it ran with, its runs.
    """
    settings: list[str] = []
    grids: dict[str, list[Any]] = {}
    for name in optimizers:
        if name in FAMILIES:
            setting, grids[setting] = experiment.tune(name, seeds[0], targets)
        else:
            setting = name
        settings.append(setting)
    settings = list(dict.fromkeys(settings))
    runs = [experiment.train(settings, seed, grids=grids) for seed in seeds]
    return dict(zip(settings, map(list, zip(*runs, strict=True)), strict=True))


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the comparison."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_common_options(parser)
    parser.add_argument(
        "--optimizers",
        nargs="+",
        default=["KFC()", *(name for name in FAMILIES if name != "LARS")],
        help=f'of {", ".join(FAMILIES)}, or a call such as "KFC(damping=0.3)" (all but LARS)',
    )
    parser.add_argument("--batch-size", type=int, default=256, help="(%(default)s)")
    parser.add_argument("--iterations", type=int, default=3000, help="budget (%(default)s)")
    parser.add_argument("--seconds", type=float, help="budget in seconds of training (none)")
    parser.add_argument("--tuning-iterations", type=int, help="budget while tuning (the same)")
    parser.add_argument("--until", type=float, help="training loss that ends a run early (none)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="(1 2 3)")
    parser.add_argument(
        "--hold-out",
        type=int,
        help="so many training examples, the last ones, take the place of the test set (none)",
    )
    parser.add_argument("--targets", type=float, nargs="+", help="training losses (by network)")
    parser.add_argument("--accuracies", type=float, nargs="*", help="test accuracies (by data)")
    arguments = parser.parse_args(argv)
    check_optimizers(parser, arguments.optimizers)
    task = task_from(parser, arguments, arguments.hold_out)
    data, network = task.name.split("/")
    targets = arguments.targets or TARGETS.get(network, CLASSIFIER_TARGETS)
    targets = sorted(targets, reverse=True)
    folder = folder_of(arguments, arguments.batch_size, arguments.hold_out)
    with progress_display() as progress:
        budget = Budget(
            arguments.iterations, arguments.seconds, arguments.tuning_iterations, arguments.until
        )
        experiment = Experiment(task, arguments.batch_size, budget, folder, progress)
        runs = compare(experiment, arguments.optimizers, arguments.seeds, targets)
    title = f"{task.name}, batch {arguments.batch_size}"
    if arguments.hold_out is not None:
        title += f", tested on {arguments.hold_out} training examples"
    accuracies = arguments.accuracies
    if accuracies is None:
        accuracies = ACCURACIES[data]
    curves.report(runs, title, targets, accuracies if task.classifies else [], folder)


if __name__ == "__main__":
    main()
