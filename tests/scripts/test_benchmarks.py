"""The measurements run: on the smallest cases, once."""

import json

import pytest

from benchmarks import harness, inverse, patches, runs, step

pytestmark = pytest.mark.slow


def test_patches_are_measured():
    row = patches.measure(patches.Case(6, 2, 3, batch=4), 1, [None, "windows"], False)
    assert row["im2col / ours"] > 0
    assert row["error"] < 1e-6
    assert "windows ms" in row


@pytest.mark.nightly
def test_memory_is_measured_in_a_process_of_its_own():
    number = str(len(patches.CASES) + 5)
    used = harness.in_child_process("benchmarks.patches", ["--memory", number])
    assert abs(used) < 2**30


@pytest.mark.parametrize("shift", inverse.SHIFTS)
def test_inverses_are_measured(shift):
    row = inverse.measure_size(65, shift, 1)
    # Float32 resolves an inverse to about its condition number, 30 over the damping.
    assert row["ours error"] < 1e-6 * 30 / shift
    assert row["ours XLA ms"] > 0


def test_steps_are_measured_by_what_is_due(monkeypatch):
    monkeypatch.setattr(step, "BATCH_SIZE", 4)
    row = step.by_kind("lenet", False, 1)
    assert all(row[f"{name} ms"] > 0 for name in ("SGD", "nothing", "factors", "both"))


def test_reports_hold_the_machine_and_the_rows(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(harness, "OUTPUT", tmp_path)
    harness.report("trial", "A trial", [{"case": "one", "ms": 1.2345, "ratio": None}], repeats=3)
    content = json.loads((tmp_path / "trial.json").read_text())
    assert content["rows"] == [{"case": "one", "ms": 1.2345, "ratio": None}]
    assert content["repeats"] == 3
    assert {"processor", "cores", "tensorflow"} <= set(content["machine"])
    assert "A trial" in capsys.readouterr().out


def test_a_setting_may_have_a_cosine_schedule_over_the_training():
    optimizer = runs.optimizer_of("KFC(cosine(0.04), cosine(0.2))", steps=10)
    for taken, part in ((0, 1.0), (5, 0.5), (10, 0.0)):
        optimizer.iterations.assign(taken)
        values = [float(optimizer.learning_rate), float(optimizer.damping)]
        assert values == pytest.approx([0.04 * part, 0.2 * part], abs=1e-8)
    with pytest.raises(ValueError, match="number of steps is not known"):
        runs.optimizer_of("KFC(cosine(0.04))")
