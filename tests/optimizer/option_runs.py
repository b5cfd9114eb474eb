"""A small net that is trained by `fit` and by hand, for tests of the optimizer's options."""

import keras
import nets
import numpy as np
import pytest
import tensorflow as tf

import keras_kfc
from keras_kfc import KFC

LOSS = "sparse_categorical_crossentropy"
STEPS = 4


def kfc(**kwargs):
    settings = {"seed": 3, "curvature_update_period": 2, "inverse_update_period": 3}
    return KFC(**{**settings, **kwargs})


def net(**options):
    """Dense layers, one of them without a bias, with options for the first."""
    keras.backend.clear_session(free_memory=False)
    keras.utils.set_random_seed(4)
    return keras.Sequential(
        [
            keras.Input((6,)),
            keras_kfc.layers.Dense(5, activation="tanh", name="hidden", **options),
            keras.layers.LayerNormalization(name="norm"),
            keras_kfc.layers.Dense(3, activation="softmax", use_bias=False, name="head"),
        ]
    )


def batches(count=STEPS, size=16):
    rng = np.random.default_rng(5)
    labels = rng.integers(0, 3, size=count * size)
    centres = rng.normal(size=(3, 6))
    return (centres[labels] + rng.normal(size=(count * size, 6))).astype("float32"), labels


def fitted(optimizer=None, model=None, size=16, epochs=1, **compiled):
    """The model after some steps."""
    model = net() if model is None else model
    model.compile(kfc() if optimizer is None else optimizer, LOSS, **compiled)
    nets.build_optimizer(model)
    x, y = batches()
    model.fit(x, y, batch_size=size, epochs=epochs, shuffle=False, verbose=0)
    return model


def by_hand(optimizer, change=lambda gradients, variables: gradients, penalty=None, size=16):
    """The weights after the same steps of an eager loop that changes gradients itself."""
    model = net()
    optimizer.build(model.trainable_variables)
    x, y = batches()
    for start in range(0, len(x), size):
        images, labels = x[start : start + size], y[start : start + size]
        with tf.GradientTape() as tape:
            with keras_kfc.Capture() as capture:
                outputs = model(images, training=True)
            value = keras.ops.mean(keras.losses.sparse_categorical_crossentropy(labels, outputs))
            value = value if penalty is None else value + penalty(model)
        variables = model.trainable_variables
        gradients = change(tape.gradient(value, variables), variables)
        optimizer.update_factors(capture, LOSS, labels, outputs)
        optimizer.apply(gradients, variables)
    return model


def assert_equal_weights(model, expected, rtol=1e-4, atol=1e-6):
    for actual, wanted in zip(model.get_weights(), expected.get_weights(), strict=True):
        np.testing.assert_allclose(actual, wanted, rtol=rtol, atol=atol)


def assert_other_weights(model, expected):
    with pytest.raises(AssertionError):
        assert_equal_weights(model, expected)
