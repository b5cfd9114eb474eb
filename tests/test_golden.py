"""Trainings end at the weights that are stored: a change of form is no change of method."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent / "golden"))

import trajectories


@pytest.mark.parametrize("name", trajectories.NETS)
def test_weights_are_the_stored_ones(name):
    stored = np.load(trajectories.FOLDER / f"{name}.npz")
    weights = trajectories.weights_after_training(name)
    assert set(weights) == set(stored)
    for key, value in weights.items():
        # To the bit on one machine; sums are rounded otherwise on another.
        np.testing.assert_allclose(value, stored[key], rtol=1e-6, atol=1e-9)


def test_another_training_would_show():
    stored = np.load(trajectories.FOLDER / "custom_loss.npz")
    start = trajectories.weights_after_training("custom_loss", steps=9)
    assert max(np.abs(value - stored[key]).max() for key, value in start.items()) > 1e-3
