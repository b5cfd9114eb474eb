"""The fallback rule against a naive Adam and Keras's own."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_kfc
from conftest import relative_error
from keras_kfc.optimizer.adam import adam_step, bias_corrections


def test_fallback_rule_is_adam_with_a_relative_epsilon():
    rng = np.random.default_rng(0)
    first = second = np.zeros(5)
    tensors = tf.zeros(5, tf.float64), tf.zeros(5, tf.float64)
    for step in range(1, 6):
        gradient = rng.normal(size=5) * [0, 1e-6, 1, 1, 100]
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient**2
        deviation = np.sqrt(second / (1 - 0.999**step))
        epsilon = 1e-5 * np.sqrt(np.mean(deviation**2))
        expected = -0.01 * (first / (1 - 0.9**step)) / (deviation + epsilon)
        update, *tensors = adam_step(
            tf.constant(gradient), *tensors, bias_corrections(tf.constant(step)), tf.constant(0.01)
        )
        assert relative_error(update, expected) < 1e-5


def test_fallback_rule_trains_as_keras_adam_does():
    """On gradients of one size, where the epsilons of both are negligible."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(32, 6)), rng.normal(size=(32, 2))
    results = []
    for optimizer in (
        keras_kfc.KFC(0.1, adam_lr_ratio=0.1, weight_decay=None),
        keras.optimizers.Adam(0.01, epsilon=1e-12),
    ):
        keras.utils.set_random_seed(1)
        model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(2)])
        model.compile(optimizer, "mse")
        model.fit(x, y, batch_size=32, epochs=10, shuffle=False, verbose=0)
        results.append(model.get_weights()[0])
    assert relative_error(*results) < 1e-3
    # A rate a tenth off would show.
    assert relative_error(results[0], np.zeros_like(results[0])) > 1e-2


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_fallback_rule_is_free_of_scale(scale):
    gradient = tf.constant([0.0, 1e-3, 1.0], tf.float64)
    zeros, corrections = tf.zeros(3, tf.float64), bias_corrections(tf.constant(1))
    rate = tf.constant(0.01)
    expected = adam_step(gradient, zeros, zeros, corrections, rate)[0]
    actual = adam_step(scale * gradient, zeros, zeros, corrections, rate)[0]
    assert relative_error(actual, expected) < 1e-12
    assert float(expected[0]) == 0.0


def test_a_gradient_whose_square_overflows_freezes_no_variable():
    """The fallback rule keeps squares: one that is infinite would stop the variable for good."""
    variable = keras.Variable(np.ones(4, "float32"))
    optimizer = keras_kfc.KFC()
    optimizer.apply([tf.constant([1e21, 1.0, 1.0, 1.0])], [variable])
    assert int(optimizer.skipped_steps) == 1
    np.testing.assert_array_equal(variable.numpy(), np.ones(4))
    optimizer.apply([tf.ones(4)], [variable])
    assert (variable.numpy() < 1).all()
