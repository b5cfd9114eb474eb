"""Two workers of a `MultiWorkerMirroredStrategy`, each a process of this machine."""

import json
import pathlib
import sys

import pytest

from benchmarks.workers import run_workers

pytestmark = pytest.mark.slow

SCRIPT = pathlib.Path(__file__).with_name("worker_cases.py")


def workers(folder, *cases, **options):
    return run_workers([sys.executable, str(SCRIPT), str(folder), *cases], **options)


def results_of(cases, folder, **options):
    """What each worker found, after a check that their weights and states are equal to the bit."""
    found = []
    for code, output, errors in workers(folder, *cases, **options):
        assert code == 0, errors[-3000:]
        found.append(json.loads(output.splitlines()[-1]))
    for case in cases:
        parts = [own[case] for own in found]
        if isinstance(parts[0], dict) and "digests" in parts[0]:
            assert parts[0]["digests"] and parts[0]["digests"] == parts[1]["digests"], case
    return found


def test_two_workers_train_as_one_device(tmp_path):
    """Several cases in two processes: starting them takes longer than most of the cases."""
    for results in results_of(["options", "sampled", "broken", "refused"], tmp_path):
        assert results["options"]["weights"] < 1e-5 and results["options"]["losses"] < 1e-5
        last, alone = results["sampled"]["last"]
        assert abs(last - alone) < 0.05 * alone
        broken = results["broken"]
        # Every second half of the first of three batches, which come three times.
        assert broken["finite"] and broken["skipped_steps"] == 3
        assert broken["rejected_factor_updates"] > 0 and not broken["rejected_inverse_updates"]
        for text in ("the same optimizer", "fingerprints", "momentum is 0.8 on the one and 0.9"):
            assert text in results["refused"]


@pytest.mark.nightly
def test_two_workers_do_what_one_device_does_otherwise(tmp_path):
    """Precision, batches that do not divide, loops of one's own, saving; what stock Keras fails."""
    cases = ["stock_keras", "uneven", "empty", "mixed_float16", "shared_out", "own_loop"]
    for results in results_of([*cases, "saved_by_the_chief"], tmp_path):
        assert results["mixed_float16"]["weights"] < 2e-2
        # Means of means, as Keras has them.
        assert results["uneven"]["weights"] < 2e-2
        assert 0 < results["empty"]["loss"][0] < 2
        assert max(results["shared_out"]["weights"]) < 1e-5
        assert results["saved_by_the_chief"]["equal"]
        losses = results["own_loop"]["losses"]
        assert len(losses) == 9 and sum(losses[-3:]) < sum(losses[:3])
        # `keras_kfc._compat.multi_worker_fit` is there for this; where Keras learns it, this
        # fails, and the module can go.
        assert results["stock_keras"] == {"fit": "ValueError", "test_on_batch": "ValueError"}


@pytest.mark.nightly
def test_a_chief_and_a_worker_are_two_workers(tmp_path):
    """What launchers set `TF_CONFIG` to; the chief saves."""
    for results in results_of(["options", "saved_by_the_chief", "refused"], tmp_path, chief=True):
        assert results["options"]["weights"] < 1e-5
        assert results["saved_by_the_chief"]["equal"]
        assert "momentum is 0.8 on the one and 0.9" in results["refused"]


@pytest.mark.nightly
def test_workers_go_on_after_one_was_killed(tmp_path):
    codes = [code for code, _, _ in workers(tmp_path, "killed")]
    assert codes[1] == 9 and codes[0]
    for results in results_of(["restarted"], tmp_path):
        restarted = results["restarted"]
        # Epochs three and four.
        assert restarted["epochs"] == 2
        assert restarted["digests"] == restarted["whole"][2:]
