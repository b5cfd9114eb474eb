"""Undamped training does not depend on coordinates."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_kfc
from conftest import relative_error


@pytest.fixture(autouse=True)
def _float64():
    keras.config.set_floatx("float64")


class _Affine(keras.layers.Layer):
    """Multiplies channels by a matrix and adds a vector; not trained."""

    def __init__(self, matrix, vector):
        super().__init__()
        self.matrix, self.vector = tf.constant(matrix), tf.constant(vector)

    def call(self, inputs):
        return tf.matmul(inputs, self.matrix) + self.vector


def _reparameterised(optimizer, steps):
    """Trains a net and the same function in other coordinates; returns both outputs.

    Second net: activations A → A V + d before each convolution and pre-activations
    S → S U + c after it, absorbed by the initial weights.
    """
    rng = np.random.default_rng(0)
    images = rng.normal(size=(24, 6, 6, 2))
    labels = np.arange(24) % 3
    affine = [(np.eye(c) + 0.4 * rng.normal(size=(c, c)), rng.normal(size=c)) for c in (2, 3, 3, 4)]

    def build(changed):
        keras.utils.set_random_seed(1)
        inputs = keras.Input((6, 6, 2))
        hidden, layers = inputs, []
        for number, filters in enumerate((3, 4)):
            layers.append(keras_kfc.layers.Conv2D(filters, 3))
            if changed:
                hidden = _Affine(*affine[2 * number])(hidden)
            hidden = layers[-1](hidden)
            if changed:
                hidden = _Affine(*affine[2 * number + 1])(hidden)
            hidden = keras.layers.Activation("tanh")(hidden)
        layers.append(keras_kfc.layers.Dense(3))
        outputs = layers[-1](keras.layers.Flatten()(hidden))
        return keras.Model(inputs, outputs), layers

    plain, plain_layers = build(False)
    changed, changed_layers = build(True)
    for number, (old, new) in enumerate(zip(plain_layers[:2], changed_layers[:2], strict=True)):
        kernel, bias = old.get_weights()
        before, shift_before = affine[2 * number]
        after, shift_after = affine[2 * number + 1]
        # (A V + d) W' + b' followed by U, c must equal A W + b.
        to_new = np.linalg.inv(before)
        kernel_new = np.einsum("ij,hwjo,op->hwip", to_new, kernel, np.linalg.inv(after))
        bias_new = (bias - shift_after) @ np.linalg.inv(after)
        bias_new = bias_new - np.einsum("i,hwio->o", shift_before, kernel_new)
        new.set_weights([kernel_new, bias_new])
    changed_layers[2].set_weights(plain_layers[2].get_weights())
    outputs = []
    for model in (plain, changed):
        model.compile(
            optimizer=optimizer(),
            loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        )
        start = model.predict(images, verbose=0)
        model.fit(images, labels, batch_size=24, epochs=steps, verbose=0, shuffle=False)
        outputs.append((start, model.predict(images, verbose=0)))
    return outputs


@pytest.mark.slow
def test_undamped_training_is_invariant_to_affine_changes_of_coordinates():
    def kfc():
        return keras_kfc.KFC(
            0.2,
            damping=1e-13,
            polyak_scaling=None,
            norm_constraint=1e-3,
            fisher="exact",
            curvature_update_period=1,
            inverse_update_period=1,
            # Zero is another place in other coordinates.
            weight_decay=None,
        )

    (start, end), (changed_start, changed_end) = _reparameterised(kfc, 5)
    assert relative_error(changed_start, start) < 1e-10
    assert relative_error(end, start) > 0.05  # it did train
    assert relative_error(changed_end, end) < 1e-3 * relative_error(end, start)


@pytest.mark.slow
def test_gradient_descent_is_not_invariant():
    """Negative control of the test above."""
    (start, end), (changed_start, changed_end) = _reparameterised(
        lambda: keras.optimizers.SGD(0.2, momentum=0.9), 5
    )
    assert relative_error(changed_start, start) < 1e-10
    assert relative_error(changed_end, end) > 0.1 * relative_error(end, start)
