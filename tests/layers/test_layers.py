"""The capturing layers behave as Keras's own under any other optimizer, to the bit."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import few
from keras import layers as plain_layers

import keras_kfc
from keras_kfc import layers as kfc_layers

# The options, and the shape of one example.
CONVOLUTIONS = [
    ({"filters": 4, "kernel_size": 3}, (7, 6, 2)),
    ({"filters": 4, "kernel_size": (2, 3), "strides": (2, 1), "padding": "same"}, (7, 6, 2)),
    ({"filters": 4, "kernel_size": 3, "dilation_rate": 2, "use_bias": False}, (7, 6, 2)),
    ({"filters": 4, "kernel_size": 3, "groups": 2, "activation": "relu"}, (7, 6, 2)),
    ({"filters": 2, "kernel_size": 1, "kernel_regularizer": "l2", "name": "one"}, (7, 6, 2)),
    ({"filters": 2, "kernel_size": 2, "kernel_constraint": "non_neg"}, (7, 6, 2)),
]
DENSE = [
    ({"units": 3}, (4,)),
    ({"units": 3, "use_bias": False, "activation": "tanh"}, (4,)),
    ({"units": 3, "bias_initializer": "ones", "activity_regularizer": "l1"}, (5, 4)),
    ({"units": 3, "kernel_initializer": "he_normal"}, (2, 5, 4)),
]
CASES = [("Conv2D", *case) for case in CONVOLUTIONS] + [("Dense", *case) for case in DENSE]


def twins(name, options):
    """Keras's layer and the capturing one with the same weights."""
    pair = []
    for module in (plain_layers, kfc_layers):
        keras.utils.set_random_seed(5)
        pair.append(getattr(module, name)(**options))
    return pair


# Every third first, so that the quick tests have both kinds.
@pytest.mark.parametrize(
    ("name", "options", "shape"), few([*CASES[::3], *CASES[1::3], *CASES[2::3]], 2)
)
def test_layers_train_as_keras_layers_do(name, options, shape):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(6, *shape)).astype("float32")
    results = []
    for layer in twins(name, options):
        model = keras.Sequential([keras.Input(shape), layer, plain_layers.Flatten()])
        y = np.ones(model.output_shape[1:], "float32")[None].repeat(6, 0)
        model.compile("adam", "mse")
        losses = model.fit(x, y, epochs=3, shuffle=False, verbose=0).history["loss"]
        results.append((losses, model(x).numpy(), *model.get_weights()))
    for plain, capturing in zip(*results, strict=True):
        np.testing.assert_array_equal(capturing, plain)


@pytest.mark.parametrize(("name", "options", "shape"), CASES)
def test_config_weights_and_shapes_are_those_of_keras(name, options, shape):
    plain, capturing = twins(name, options)
    keras.backend.clear_session(free_memory=False)
    plain.build((None, *shape))
    capturing.build((None, *shape))
    config = capturing.get_config()
    assert {**config, "name": None} == {**plain.get_config(), "name": None}
    assert [w.shape for w in capturing.weights] == [w.shape for w in plain.weights]
    assert [w.name for w in capturing.weights] == [w.name for w in plain.weights]
    assert capturing.compute_output_shape((None, *shape)) == plain.compute_output_shape(
        (None, *shape)
    )
    again = type(capturing).from_config(config)
    assert again.get_config() == config
    restored = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(capturing))
    assert type(restored) is type(capturing) and restored.get_config() == config


def test_channels_first_convolution_computes_what_channels_last_does():
    """Keras's own kernel for channels first needs a GPU; under XLA it runs on a CPU too."""
    x = np.random.default_rng(0).normal(size=(2, 6, 5, 3)).astype("float32")
    last = kfc_layers.Conv2D(4, 3, bias_initializer="ones")
    expected = last(x).numpy()
    first = kfc_layers.Conv2D(4, 3, data_format="channels_first")
    moved = tf.constant(np.moveaxis(x, -1, 1))
    first.build(moved.shape)
    first.set_weights(last.get_weights())
    outputs = tf.function(first, jit_compile=True)(moved).numpy()
    np.testing.assert_allclose(np.moveaxis(outputs, 1, -1), expected, rtol=1e-5, atol=1e-5)


def test_inference_records_nothing():
    """Only a training pass of a model with KFC, or an open capture, makes a layer record."""
    layer = kfc_layers.Dense(2)
    layer(np.ones((3, 4), "float32"))
    with keras_kfc.Capture() as capture:
        pass
    assert capture.paths == []
    model = keras.Sequential([layer])
    model.compile(keras_kfc.KFC(), "mse")
    model.predict(np.ones((3, 4)), verbose=0)
    model.evaluate(np.ones((3, 4)), np.ones((3, 2)), verbose=0)
    model.optimizer.build(model.trainable_variables)
    assert all(float(block.ema_weight) == 0 for block in model.optimizer.blocks)
