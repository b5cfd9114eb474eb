"""Everyday tasks, a minute of them: none diverges, each ends within reach of tuned Adam.

`python -m benchmarks.everyday` has all of them, with three seeds and more baselines.
"""

import keras
import numpy as np
import pytest
from helpers import few

import keras_kfc
from benchmarks.everyday import TASKS
from benchmarks.everyday.report import Row, summary
from benchmarks.everyday.runs import Run, Trainer

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("name", "batch"),
    few(
        [
            ("digits", 1),
            ("raw targets", 32),
            ("own train step", 32),
            ("masks, Dice", 16),
            ("digits", 32),
            ("rare positives", 32),
            ("noisy sine", 32),
            ("a constant in the loss", 32),
            ("variational autoencoder", 64),
            ("physics-informed", 64),
        ],
        3,
    ),
)
def test_what_trains_with_adam_trains_with_kfc(name, batch):
    task = TASKS[name]
    steps = task.steps[task.batches.index(batch)]
    adam = Trainer(task, batch, steps, lambda: keras.optimizers.Adam(1e-3), instrumented=False)
    best = min(adam.run(1, rate).end for rate in (1e-3, 1e-2))
    run = Trainer(task, batch, steps, lambda: keras_kfc.KFC(seed=1), instrumented=True).run(1)
    assert not run.diverged
    # The fallback rule, an Adam, trains this one: the last points of any Adam are noise there.
    assert run.end <= (5.0 if name == "physics-informed" else 1.1) * best


def test_a_training_that_diverges_is_counted():
    task = TASKS["raw targets"]
    wild = Trainer(
        task, 32, 50, lambda: keras_kfc.KFC(0.5, polyak_scaling=None, damping=1e-3, seed=1), True
    ).run(1)
    assert wild.diverged


@pytest.mark.nightly
def test_runs_of_one_trainer_do_not_know_of_each_other():
    task = TASKS["wines"]
    trainer = Trainer(task, 32, 50, lambda: keras_kfc.KFC(seed=1), instrumented=True)
    first, other, again = trainer.run(1), trainer.run(2), trainer.run(1)
    assert first.curve == again.curve
    assert first.curve != other.curve


def test_ratios_are_those_to_the_best_baseline():
    def runs(*ends):
        return [Run([1.0, (1 + end) / 2, end], test=2 * end) for end in ends]

    row = Row(
        "task",
        32,
        False,
        kfc=runs(0.02, 0.08),
        baselines={"Adam(0.1)": runs(0.1, 0.1), "Adam(0.2)": runs(0.05, 0.3)},
    )
    # Geometric means over seeds: 0.04 against 0.1, and not 0.12.
    assert row.best == "Adam(0.1)"
    assert row.ratio("end") == pytest.approx(0.4)
    assert row.ratio("test") == pytest.approx(0.4)
    assert row.diverged == 0
    worse = Row("other", 1, False, runs(0.5, np.nan), {"Adam(0.1)": runs(0.1, 0.1)})
    assert worse.diverged == 1 and worse.ratio("end") == np.inf
    line = summary([row, worse])
    assert "1 of 4 runs diverged" in line
    assert "1 of 2 (50%)" in line
    # What is below a ten-thousandth of the start is not told apart.
    assert Run([1.0, 1e-9], test=0.0).end == 1e-4
