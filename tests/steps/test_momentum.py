"""Momentum is as long as steps are now, and not as they were when its gradients came."""

import keras
import numpy as np
import pytest
from keras import ops

import keras_kfc
from examples import image_classifier
from examples.data import load_digits
from keras_kfc.steps.polyak import PolyakSteps


@pytest.mark.slow
def test_momentum_of_long_steps_does_not_go_on_when_steps_are_short(monkeypatch):
    """Predictions would become ten times as sure as they are right, which takes long to undo."""
    digits = load_digits()

    def error_over_entropy(optimizer):
        keras.utils.set_random_seed(1)
        model = keras_kfc.instrument(image_classifier.net())
        model.compile(optimizer, "sparse_categorical_crossentropy")
        chosen = np.random.default_rng(0).permutation(len(digits.train_images))[: 22 * 64]
        x, y = digits.train_images[chosen], digits.train_labels[chosen]
        model.fit(x, y, batch_size=64, verbose=0)
        outputs = ops.convert_to_numpy(model(x, training=True)).astype("float64")
        entropy = -np.mean(np.sum(outputs * np.log(outputs + 1e-12), axis=1))
        return -np.mean(np.log(outputs[np.arange(len(y)), y] + 1e-12)) / entropy

    assert error_over_entropy(keras.optimizers.Adam(0.01)) < 3
    assert error_over_entropy(keras_kfc.KFC(seed=1)) < 4
    monkeypatch.setattr(PolyakSteps, "momentum", lambda self, query: query.momentum)
    assert error_over_entropy(keras_kfc.KFC(seed=1)) > 8
