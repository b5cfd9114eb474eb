"""The training comparison: what it measures, chooses, keeps and shows."""

import json
import math

import numpy as np
import pytest

from benchmarks import curves, options, runs, search, training
from benchmarks.runs import Run, Trainer
from benchmarks.tasks import task_of

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def task():
    return task_of("digits/mlp", examples=200)


def run_of(losses, setting="KFC()", seconds=1.0, accuracies=None):
    """A run that was measured every ten iterations."""
    iterations = [10 * i for i in range(len(losses))]
    return Run(
        "digits/mlp",
        setting,
        64,
        1,
        "now",
        0.5,
        iterations,
        [seconds * i for i in iterations],
        list(losses),
        list(losses),
        list(accuracies or [1 - loss for loss in losses]),
    )


def test_schedule_grows_by_a_tenth_and_ends_at_the_budget():
    marks = runs.schedule(1000)
    assert marks[:3] == [0, 10, 11] and marks[-1] == 1000
    ratios = np.array(marks[15:-1]) / np.array(marks[14:-2])
    assert ratios.max() < 1.13
    assert runs.schedule(5) == [0, 5]


def test_all_optimizers_see_the_same_batches_from_the_same_weights(task):
    class Recorder(Trainer):
        def _batch(self):
            batch = super()._batch()
            self.seen.append(batch[0].numpy())
            return batch

        seen: list

    recorders = []
    for setting in ("SGD(0.0)", "Adam(0.0)"):
        recorder = Recorder(task, setting, 64, seed=3)
        recorder.seen = []
        recorder.start()
        recorder.train_to(3)
        recorder.train_to(5)
        recorder.measure()
        recorders.append(recorder)
    first, second = recorders
    for a, b in zip(first.seen, second.seen, strict=True):
        np.testing.assert_array_equal(a, b)
    # The batch that was traced with comes again as the first one, and is undone.
    np.testing.assert_array_equal(first.seen[0], first.seen[1])
    assert first.run.losses == second.run.losses
    # 200 examples in batches of 64: three batches, then what is left leads the next epoch.
    epoch = np.concatenate(first.seen[1:5])[:200]
    assert len(np.unique(epoch, axis=0)) == len(np.unique(task.train_inputs, axis=0))


def test_measured_loss_and_accuracy_are_keras_own(task):
    trainer = Trainer(task, "SGD(0.1)", 64, seed=1)
    trainer.start()
    trainer.train_to(4)
    trainer.measure()
    model = trainer._model
    model.compile(loss=task.loss, metrics=["accuracy"])
    loss, accuracy = model.evaluate(task.test_inputs, task.test_targets, verbose=0)
    assert trainer.run.test_losses[-1] == pytest.approx(loss, rel=1e-4)
    assert trainer.run.test_accuracies[-1] == pytest.approx(accuracy)
    assert trainer.run.losses[-1] == pytest.approx(
        model.evaluate(task.train_inputs, task.train_targets, verbose=0)[0], rel=1e-4
    )
    assert trainer.run.losses[-1] < trainer.run.losses[0]


def test_starting_leaves_weights_and_state_as_they_were(task):
    trainer = Trainer(task, "KFC()", 64, seed=1)
    before = trainer._model.get_weights()
    trainer.start()
    for a, b in zip(before, trainer._model.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    optimizer = trainer._model.optimizer
    assert int(optimizer.iterations) == 0
    assert all(float(np.abs(block.omega).max()) == 0 for block in optimizer.blocks)
    assert trainer.run.start_up > 0


@pytest.mark.parametrize(
    "setting", ["KFC", "KFC(", "Nothing()", "SGD(x)", "KFC(damping=-1.0)", "SGD(nothing=1)", "1"]
)
def test_bad_settings_are_refused(setting, capsys):
    with pytest.raises(ValueError, match="must be a call of an optimizer"):
        runs.optimizer_of(setting)
    with pytest.raises(SystemExit):
        training.main(["--optimizers", setting])
    assert "Received" in capsys.readouterr().err


def test_search_walks_to_the_best_and_keeps_the_grid():
    tried = []

    def train(setting):
        rate = search.number_in(search.FAMILIES["SGD"], setting)
        tried.append(rate)
        assert float(runs.optimizer_of(setting).learning_rate) == pytest.approx(rate)
        miss = abs(math.log(rate / 0.5))
        if rate > 4:
            return run_of([1.0, math.inf], setting)
        return run_of([1.0] * (1 + int(10 * miss)) + [0.2], setting)

    best, grid = search.search(search.FAMILIES["SGD"], train, [0.25])
    assert best == "SGD(0.5, momentum=0.9, nesterov=True)"
    # From around 0.02 up to a worse neighbour on the other side, each once.
    assert sorted(tried) == [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0]
    hits = [row["iterations"][0] for row in grid]
    assert hits[:-1] == sorted(hits[:-1], reverse=True) and hits[-1] > hits[-2]


def test_search_prefers_runs_that_reach_more_then_sooner_then_lower():
    targets = [0.5, 0.2]
    both, soon, late, low, lost = (
        run_of([1, 0.5, 0.4, 0.2]),
        run_of([1, 0.5, 0.5]),
        run_of([1, 0.8, 0.5, 0.4]),
        run_of([1, 0.8, 0.5, 0.3]),
        run_of([1, 0.9, math.inf]),
    )
    order = sorted([lost, late, both, low, soon], key=lambda run: search.score(run, targets))
    assert order == [both, soon, low, late, lost]


def test_numbers_of_the_series():
    assert [search.number_of(i) for i in (-2, -1, 0, 1, 2, 3)] == [0.2, 0.5, 1, 2, 5, 10]
    for index in range(-12, 6):
        assert search.index_of(search.number_of(index)) == index
    with pytest.raises(ValueError, match="Received"):
        search.index_of(0.03)


def test_search_tries_at_least_five_values():
    def train(setting):
        rate = search.number_in(search.FAMILIES["Adam"], setting)
        return run_of([1.0, 0.5 + abs(math.log(rate / 0.002))], setting)

    best, grid = search.search(search.FAMILIES["Adam"], train, [0.1])
    assert best == "Adam(0.002)"
    tried = [search.number_in(search.FAMILIES["Adam"], row["setting"]) for row in grid]
    # The edge that is less bad comes first.
    assert tried == [0.0005, 0.001, 0.002, 0.005, 0.01]
    best, grid = search.search(search.FAMILIES["Adam"], train, [0.1], fewest=3)
    assert best == "Adam(0.002)" and len(grid) == 3


def test_ratios_are_those_of_medians_and_bounds_where_a_target_was_missed():
    ours = [run_of([1, 0.2]), run_of([1, 0.5, 0.2]), run_of([1, 0.5, 0.5, 0.2])]
    theirs = [run_of([1.0] * 10 + [0.2] + [0.2] * 2, seconds=0.5) for _ in range(3)]
    never = [run_of([1.0] * 8) for _ in range(3)]
    wild = [run_of([1.0, math.inf]) for _ in range(3)]
    rows = curves.to_target({"a": ours, "b": theirs, "c": never, "d": wild}, loss=0.25)
    ratios = {name: [row["ratio"][name] for row in rows] for name in ("iterations", "seconds")}
    assert ratios["iterations"][:3] == [1, 5, 3.5] and math.isnan(ratios["iterations"][3])
    assert ratios["seconds"][:3] == [1, 2.5, 3.5]
    # The first step took half a second.
    assert rows[1]["ratio"]["total"] == pytest.approx(50.5 / 20.5)
    assert [row["missed"] for row in rows] == [False, False, True, True]
    assert [row["diverged"] for row in rows] == [False, False, False, True]
    assert rows[0]["iterations"] == [10, 20, 30]
    (row,) = curves.to_target({"a": ours}, accuracy=0.8)
    assert row["iterations"] == [10, 20, 30] and row["test"] == [0.8] * 3
    # A target above the loss of the start has no ratio.
    (row,) = curves.to_target({"a": ours}, loss=2.0)
    assert row["iterations"] == [0, 0, 0] and math.isnan(row["ratio"]["iterations"])


def test_tables_show_bounds_spreads_and_divergence(tmp_path, capsys):
    runs_ = {
        "KFC()": [run_of([1, 0.2]), run_of([1, 0.5, 0.2])],
        "SGD(0.1)": [run_of([1.0] * 8) for _ in range(2)],
        "SGD(9.0)": [run_of([1.0, math.inf]) for _ in range(2)],
    }
    runs_["SGD(0.1)"][0].session = "later"
    curves.report(runs_, "a title", [0.25], [], tmp_path)
    text = (tmp_path / "summary.md").read_text()
    assert "| KFC() | 15 (10–20) | 1.0 |" in text
    assert "| SGD(0.1) | >70 | >4.7 |" in text and "| SGD(9.0) | diverged | - |" in text
    assert "did not" not in text and "Not all runs" in text and "median of 2 seeds" in text


def test_runs_survive_their_file(tmp_path):
    run = run_of([1.0, math.inf], accuracies=[0.5, 0.1])
    run.save(tmp_path / "run.json", grid=[])
    assert "Infinity" not in (tmp_path / "run.json").read_text()
    assert Run.load(tmp_path / "run.json") == run


def test_the_command_trains_tunes_keeps_and_resumes(tmp_path, monkeypatch, capsys):
    def options(*optimizers):
        return [
            *("--task", "digits/mlp", "--examples", "200", "--batch-size", "50"),
            *("--iterations", "12", "--tuning-iterations", "11", "--until", "0.001"),
            *("--seeds", "1", "2", "--targets", "2.0", "0.5"),
            *("--accuracies", "0.5", "--output", str(tmp_path)),
            *("--optimizers", *optimizers),
        ]

    training.main(options("Adam(0.01)", "SGD"))
    output = capsys.readouterr().out
    folder = tmp_path / "digits-mlp-200-batch-50"
    assert "To training loss 0.5" in output and "To test accuracy 0.5" in output
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert "| Adam(0.01) |" in (folder / "summary.md").read_text()
    kept = {path: json.loads(path.read_text()) for path in (folder / "runs").iterdir()}
    assert sorted(content["seed"] for content in kept.values()) == [1, 1, 2, 2]
    for content in kept.values():
        assert content["iterations"] == [0, 10, 11, 12]
        assert len(content["losses"]) == len(content["test_accuracies"]) == 4
        assert content["machine"]["cores"] and content["budget"]["iterations"] == 12
        assert content["budget"]["until"] == 0.001
        assert ("grid" in content) == content["setting"].startswith("SGD")
    tuned = [json.loads(path.read_text()) for path in (folder / "grid").iterdir()]
    assert len(tuned) >= 3 and all(run["iterations"][-1] <= 11 for run in tuned)
    # What is there is not run again; what is new is.
    made = []
    real = training.Trainer

    def watched(task, setting, batch_size, seed):
        made.append((setting, seed))
        return real(task, setting, batch_size, seed)

    monkeypatch.setattr(training, "Trainer", watched)
    next(path for path in kept if "Adam" in path.name and "seed-2" in path.name).unlink()
    training.main(options("Adam(0.01)", "SGD", "Lion(0.001)"))
    assert sorted(made) == [("Adam(0.01)", 2), ("Lion(0.001)", 1), ("Lion(0.001)", 2)]
    # Runs that are tested on something else are others.
    capsys.readouterr()
    training.main([*options("Adam(0.01)"), "--hold-out", "30"])
    assert "tested on 30 training examples" in capsys.readouterr().out
    assert (tmp_path / "digits-mlp-200-30-held-out-batch-50" / "summary.md").exists()


def test_a_budget_in_seconds_and_divergence_end_a_run(tmp_path, task):
    with options.progress_display() as progress:
        budget = training.Budget(1000, 1e-6)
        experiment = training.Experiment(task, 50, budget, tmp_path, progress)
        slow, wild = experiment.train(["SGD(0.01)", "SGD(1e6)"], seed=1)
    assert slow.iterations == wild.iterations == [0, 10]
    assert wild.diverged and not slow.diverged


def test_a_training_loss_ends_a_run(tmp_path, task):
    with options.progress_display() as progress:
        budget = training.Budget(1000, until=0.5)
        experiment = training.Experiment(task, 50, budget, tmp_path, progress)
        (run,) = experiment.train(["Adam(0.01)"], seed=1)
    assert run.losses[-1] <= 0.5 < run.losses[-2] and run.iterations[-1] < 1000
