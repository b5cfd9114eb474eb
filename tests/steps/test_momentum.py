"""Momentum is as long as steps are now, and not as they were when its gradients came."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import ops

import keras_kfc
from examples import image_classifier
from examples.data import load_digits
from keras_kfc.steps.api import StepQuery
from keras_kfc.steps.loss_trend import Progress
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


def test_momentum_follows_the_average_of_the_ratio_and_less_so_later():
    """By hand: the ratio's average is 10; a batch's slope is 4 with a gap of 0.2, so 20."""

    def kept(losses, slope, momentum=0.9, count=1000.0, known=True):
        variables = []

        def variable(shape, dtype, name):
            variables.append(keras.Variable(np.zeros(shape), dtype=dtype, name=name))
            return variables[-1]

        progress = Progress(variable)
        rule = PolyakSteps(variable, progress)
        rule.build(variable, 1, False)
        for _ in range(losses):
            progress.observe(tf.constant(0.2), tf.constant(known))
        rule._ratio.assign(10.0)
        rule._ratio_count.assign(count)
        query = StepQuery(0.03, momentum, 1.0, tf.constant(slope), 0.0, slope, np.ones(1), [False])
        before = [ops.convert_to_numpy(v) for v in variables]
        asked = float(rule.momentum(query))
        after = [ops.convert_to_numpy(v) for v in variables]
        assert all(np.array_equal(new, old) for new, old in zip(after, before, strict=True))
        return asked / momentum

    gap = 0.2  # a constant loss, in the first steps
    assert kept(10, 20 * gap) == pytest.approx(10 / 10.5, rel=1e-5)
    assert kept(10, 10 * gap) == pytest.approx(1.0, rel=1e-5)
    # Early averages move faster: by 5 / (4 + 5).
    assert kept(10, 20 * gap, count=4.0) == pytest.approx(10 / (10 + 50 / 9), rel=1e-5)
    # No layer is carried further than 1.8 times, whatever momentum is.
    for momentum in (0.5, 0.9, 0.99):
        longest = (1 - momentum) / (1 - momentum * kept(10, 1e-9, momentum, count=0.5))
        assert longest == pytest.approx(1.8, rel=1e-5)
    # Gradients that promise nothing, or an increase, and one that is not finite.
    assert kept(10, 0.0) == kept(10, -1.0) == pytest.approx(1.0)
    assert kept(10, float("inf")) == pytest.approx(1.0)
    # After 400 losses, the power of a quarter; and the gap of a constant loss is a quarter, too.
    assert kept(400, 20 * gap / 4) == pytest.approx((10 / 10.5) ** 0.25, rel=1e-5)
    # Where nothing is known there is nothing to follow: no ratio, no loss, no lowest loss.
    assert kept(10, 20 * gap, count=0.0) == pytest.approx(1.0)
    assert kept(20, 20 * gap, known=False) == pytest.approx(1.0)
    assert kept(0, 4.0) == pytest.approx(1.0)
