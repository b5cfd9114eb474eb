"""What every way of placing a training on devices must do, in a process of its own for each."""

import json
import pathlib
import subprocess
import sys

import pytest

from benchmarks.workers import run_workers

pytestmark = pytest.mark.slow

# A line for each placement, and one in `placement_checks.STRATEGIES`.
PLACEMENTS = ["SinglePlacement", "MirroredPlacement", "WorkersPlacement"]
CHECKS = [
    "a_strategy_has_its_placement",
    "sums_are_over_replicas",
    "parts_are_gathered_in_order",
    "averages_are_weighted_and_taken_once",
    "counts_are_added_up",
    "inverses_are_those_of_one_replica",
    "another_strategy_is_refused",
]


def results_of(placement):
    """What every process found."""
    script = pathlib.Path(__file__).with_name("placement_checks.py")
    if placement == "WorkersPlacement":
        done = run_workers([sys.executable, str(script), placement])
    else:
        own = subprocess.run(
            [sys.executable, script, placement], capture_output=True, text=True, check=False
        )
        done = [(own.returncode, own.stdout, own.stderr)]
    for code, _, errors in done:
        assert code == 0, errors[-2000:]
    return [json.loads(output.splitlines()[-1]) for _, output, _ in done]


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_placement(placement):
    """All checks at once: starting the processes takes longer than the checks."""
    for result in results_of(placement):
        assert set(PLACEMENTS) == {"SinglePlacement", *result["registered"]}
        assert list(result["faults"]) == CHECKS
        faults = {check: found for check, found in result["faults"].items() if found}
        assert not faults
