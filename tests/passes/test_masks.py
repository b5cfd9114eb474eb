"""Padded positions of masked sequences count in no factor. Oracles in float64 NumPy."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_kfc
from conftest import relative_error
from keras_kfc.curvature.layout import KroneckerLayout
from keras_kfc.maps.dense import DenseMap

LENGTHS = np.array([4, 1, 3, 2, 4, 2])
STEPS, INPUTS, UNITS = 4, 3, 2
EXAMPLES = len(LENGTHS)
REAL = np.arange(STEPS) < LENGTHS[:, None]


def data(masked=True):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(EXAMPLES, STEPS, INPUTS)).astype("float32")
    if masked:
        x[~REAL] = 0
    return x, rng.normal(size=(EXAMPLES, STEPS, UNITS)).astype("float32")


def naive(inputs, derivatives, real):
    """Omega and gamma by loops over the positions that count."""
    omega, gamma, count = 0.0, 0.0, 0
    for example in range(len(inputs)):
        for step in range(STEPS):
            if real[example, step]:
                a = np.append(inputs[example, step].astype("float64"), 1.0)
                d = derivatives[example, step].astype("float64")
                omega, gamma, count = omega + np.outer(a, a), gamma + np.outer(d, d), count + 1
    return omega / len(inputs), gamma / count


class OwnLoss(keras.Sequential):
    """Trains with a loss that knows of no mask: derivatives of padding are not zero."""

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(self(x) - y))
        gradients = tape.gradient(loss, self.trainable_variables)
        self.optimizer.apply(gradients, self.trainable_variables)
        return {"loss": loss}


def trained(model, x, y, masking=True, **options):
    """A model of one Dense layer after two steps that change no weights."""
    layers = [keras.layers.Masking()] if masking else []
    net = model([keras.Input((STEPS, INPUTS)), *layers, keras_kfc.layers.Dense(UNITS)])
    periods = {"curvature_update_period": 1, "curvature_ema": 0.0, "seed": 1}
    periods["weight_sharing"] = "expand"
    net.compile(keras_kfc.KFC(0.0, **periods, **options), "mse")
    net.fit(x, y, batch_size=EXAMPLES, epochs=2, shuffle=False, verbose=0)
    return net


def residuals(model, x, y):
    kernel, bias = (w.astype("float64") for w in model.get_weights())
    return 2 * (x @ kernel + bias - y) / (STEPS * UNITS)


@pytest.mark.parametrize("masking", [True, False])
def test_padding_does_not_count(masking):
    x, y = data()
    model = trained(OwnLoss, x, y, masking)
    (block,) = model.optimizer.blocks
    right = naive(x, residuals(model, x, y), REAL if masking else np.ones_like(REAL))
    wrong = naive(x, residuals(model, x, y), np.ones_like(REAL) if masking else REAL)
    for factor, expected, other in zip((block.omega, block.gamma), right, wrong, strict=True):
        assert relative_error(factor[0], expected) < 1e-5
        # Negative control.
        assert relative_error(factor[0], other) > 0.05


@pytest.mark.nightly
def test_padding_does_not_count_with_a_compiled_loss():
    """Exact Gauss-Newton matrix: each real position's derivative is of one size."""
    x, y = data()
    (block,) = trained(keras.Sequential, x, y, fisher="exact").optimizer.blocks
    omega, _ = naive(x, y, REAL)
    assert relative_error(block.omega[0], omega) < 1e-5
    whole = trained(keras.Sequential, x, y, masking=False, fisher="exact").optimizer.blocks[0]
    # Keras's mean is over real positions where there is a mask, so that each counts more.
    ratio = REAL.size / REAL.sum()
    assert relative_error(block.gamma[0], ratio * np.asarray(whole.gamma[0])) < 1e-4


def test_masks_go_with_the_examples_that_are_drawn():
    x, y = data()
    model = trained(OwnLoss, x, y, factor_batch_size=2)
    (block,) = model.optimizer.blocks
    derivatives = residuals(model, x, y)
    errors = []
    for start in range(EXAMPLES):
        drawn = np.arange(start, start + 2) % EXAMPLES
        omega, gamma = naive(x[drawn], derivatives[drawn], REAL[drawn])
        errors.append(relative_error(block.omega[0], omega) + relative_error(block.gamma[0], gamma))
    assert min(errors) < 1e-5 and sorted(errors)[1] > 0.05


@pytest.mark.parametrize("middle", [(), (2,)])
def test_cut_factors_are_blocks_of_the_whole_ones(middle):
    """Masks of the first axes of an input with more of them, too."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(EXAMPLES, STEPS, *middle, 4))
    d = rng.normal(size=(EXAMPLES, STEPS, *middle, 6))
    rows, derivatives = x[REAL].reshape(-1, 4), d[REAL].reshape(-1, 6)
    mask = tf.constant(REAL)
    partition = KroneckerLayout(DenseMap(4, 6), True, 2, 3)
    omega = partition.omega([tf.constant(x)], EXAMPLES, [mask])
    gamma = partition.gamma([tf.constant(d)], [mask])
    for part in range(2):
        own = rows[:, 2 * part : 2 * part + 2]
        own = np.column_stack([own, np.full(len(rows), 1.0 - part)])
        assert relative_error(omega[part], own.T @ own / EXAMPLES) < 1e-6
    for part in range(3):
        own = derivatives[:, 2 * part : 2 * part + 2]
        assert relative_error(gamma[part], own.T @ own / len(rows)) < 1e-6


def test_a_batch_of_nothing_but_padding():
    partition = KroneckerLayout(DenseMap(4, 6), True)
    mask = tf.zeros((2, 3), tf.bool)
    assert not np.any(partition.omega([tf.ones((2, 3, 4))], 2, [mask]))
    assert not np.any(partition.gamma([tf.ones((2, 3, 6))], [mask]))
