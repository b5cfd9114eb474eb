"""What every way of placing a training on devices must do, in a process of its own for each."""

import functools
import json
import pathlib
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

# A line for each placement, and one in `placement_checks.STRATEGIES`.
PLACEMENTS = ["SinglePlacement", "MirroredPlacement"]
CHECKS = [
    "a_strategy_has_its_placement",
    "sums_are_over_replicas",
    "averages_are_weighted_and_taken_once",
    "another_strategy_is_refused",
]


@functools.cache
def checked(placement):
    script = pathlib.Path(__file__).with_name("placement_checks.py")
    done = subprocess.run(
        [sys.executable, script, placement], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_every_placement_and_check_is_here(placement):
    result = checked(placement)
    assert set(PLACEMENTS) == {"SinglePlacement", *result["registered"]}
    assert list(result["faults"]) == CHECKS


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_placement(placement, check):
    fault = checked(placement)["faults"][check]
    assert not fault, fault
