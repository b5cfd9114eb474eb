"""Trainings end at the weights that are stored: a change of form is no change of method."""

import keras
import nets
import numpy as np
import pytest
import resuming
import trajectories
from helpers import few

from keras_kfc.optimizer.archive import FORMAT_VERSION

QUICK = ("conv_net",)
FILES = sorted(
    trajectories.FOLDER.glob("format-*.keras"), key=lambda path: int(path.stem.split("-")[1])
)


def test_there_is_a_file_of_this_format():
    assert trajectories.FOLDER / f"format-{FORMAT_VERSION}.keras" in FILES


# The newest first: it is the quick one.
@pytest.mark.parametrize("path", few(FILES[::-1], 1), ids=lambda path: path.stem)
def test_stored_models_load_and_go_on(path):
    model = keras.models.load_model(path)
    assert len(model.optimizer.blocks) == 2
    before = nets.flat_weights(model)
    resuming.fit(model, epochs=4, first=2)
    stored = np.load(path.with_suffix(".npz"))
    for index, weights in enumerate(model.get_weights()):
        np.testing.assert_allclose(weights, stored[str(index)], rtol=1e-2, atol=1e-4)
    # Without the stored factors and momenta it would go another way.
    fresh = keras.models.load_model(path, compile=False)
    fresh.compile(resuming.default_optimizer(), "sparse_categorical_crossentropy")
    resuming.fit(fresh, epochs=4, first=2)
    moved = np.linalg.norm(nets.flat_weights(model) - before)
    assert np.linalg.norm(nets.flat_weights(model) - nets.flat_weights(fresh)) > 0.1 * moved


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
        for name in trajectories.NETS
    ],
)
def test_weights_are_the_stored_ones(name):
    stored = np.load(trajectories.FOLDER / f"{name}.npz")
    weights = trajectories.weights_after_training(name)
    assert set(weights) == set(stored)
    for key, value in weights.items():
        # To the bit on one machine; sums are rounded otherwise on another.
        np.testing.assert_allclose(value, stored[key], rtol=1e-6, atol=1e-9)


@pytest.mark.slow
def test_another_training_would_show():
    stored = np.load(trajectories.FOLDER / "custom_loss.npz")
    start = trajectories.weights_after_training("custom_loss", steps=9)
    assert max(np.abs(value - stored[key]).max() for key, value in start.items()) > 1e-3
