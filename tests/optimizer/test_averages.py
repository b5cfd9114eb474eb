"""Averages of weights and of gradients of micro-batches."""

import keras
import nets
import numpy as np
import pytest
from option_runs import LOSS, assert_equal_weights, assert_other_weights, batches, fitted, kfc, net

import keras_kfc


class Trajectory(keras.callbacks.Callback):
    def __init__(self):
        super().__init__()
        self.weights = []

    def on_train_batch_end(self, batch, logs=None):
        self.weights.append([np.asarray(v) for v in self.model.trainable_variables])


@pytest.mark.slow
def test_averaged_weights_are_the_moving_average_of_the_trajectory():
    model = net()
    model.compile(kfc(), LOSS)
    trajectory = Trajectory()
    x, y = batches()
    model.fit(x, y, batch_size=16, shuffle=False, verbose=0, callbacks=[trajectory])
    average = trajectory.weights[0]
    for weights in trajectory.weights[1:]:
        average = [0.7 * a + 0.3 * w for a, w in zip(average, weights, strict=True)]
    averaged = fitted(kfc(use_ema=True, ema_momentum=0.7))
    for actual, expected in zip(averaged.trainable_variables, average, strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-6)
    overwritten = fitted(kfc(use_ema=True, ema_momentum=0.7, ema_overwrite_frequency=2))
    assert_other_weights(overwritten, averaged)
    assert np.isfinite(nets.flat_weights(overwritten)).all()


def factors_on(model, x):
    return keras_kfc.kronecker_factors(model, x, loss=LOSS, fisher="exact")


@pytest.mark.nightly
def test_factors_see_every_micro_batch_of_an_accumulated_step():
    x, _ = batches()
    model = net()
    parts = [factors_on(model, part) for part in np.split(x, 2)]
    optimizer = kfc(gradient_accumulation_steps=2, fisher="exact")
    fitted(optimizer, model, size=32)
    assert int(optimizer.iterations) == 1
    for block in optimizer.blocks:
        first, second = (part[block.path] for part in parts)
        for name in ("omega", "gamma"):
            whole = (getattr(first, name) + getattr(second, name)) / 2
            actual = np.asarray(getattr(block, name))[0]
            np.testing.assert_allclose(actual, whole, rtol=1e-4, atol=1e-7)


@pytest.mark.slow
def test_accumulated_micro_batches_are_one_batch():
    """With averages that hardly forget, two halves have the factors of the whole."""
    settings = {
        "fisher": "exact",
        "curvature_ema": 0.9999,
        "polyak_scaling": None,
        "weight_decay": None,
    }
    whole = fitted(kfc(**settings), size=32)
    halves = fitted(kfc(gradient_accumulation_steps=2, **settings), size=16)
    assert_equal_weights(halves, whole, rtol=2e-3, atol=1e-5)
    assert_other_weights(halves, fitted(kfc(**settings), size=16))
