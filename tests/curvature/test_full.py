"""The structure of whole blocks by group, and the layers that it is for."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import few
from keras import layers

import keras_kfc
from conftest import relative_error

RNG = np.random.default_rng(0)
B = 6
LAYERS = {
    "layer norm": (lambda: layers.LayerNormalization(dtype="float64"), (4, 3)),
    "batch norm": (
        lambda: layers.BatchNormalization(dtype="float64"),
        (4, 3),
    ),
    "group norm": (lambda: layers.GroupNormalization(2, dtype="float64"), (3, 4)),
    "rms norm": (lambda: layers.RMSNormalization(dtype="float64"), (4, 3)),
    "prelu": (lambda: layers.PReLU(shared_axes=[1], dtype="float64"), (4, 3)),
    "depthwise": (
        lambda: layers.DepthwiseConv2D(2, depth_multiplier=2, dtype="float64"),
        (4, 3, 2),
    ),
}


def built(name):
    make, shape = LAYERS[name]
    keras.utils.set_random_seed(1)
    inputs = keras.Input(shape, dtype="float64")
    hidden = layers.Flatten(dtype="float64")(make()(inputs))
    model = keras.Model(inputs, layers.Dense(2, dtype="float64", trainable=False)(hidden))
    for variable in model.trainable_variables:
        variable.assign(RNG.normal(size=variable.shape))
    return keras_kfc.instrument(model), RNG.normal(size=(B, *shape))


def explicit(model, x, linear_map):
    """The Fisher matrix of two outputs with unit variance, from Jacobians of single examples."""
    variables = [variable.value for variable in model.trainable_variables]
    total = 0
    for example in range(B):
        with tf.GradientTape() as tape:
            outputs = model(x[example : example + 1], training=False)[0]
        jacobians = tape.jacobian(outputs, variables)
        for output in range(2):
            parts = [jacobian[output] for jacobian in jacobians]
            weights = linear_map.stack_bias(parts[0], parts[1] if len(parts) > 1 else None)
            rows = tf.reshape(weights, (weights.shape[0], -1)).numpy()
            total += rows[:, :, None] * rows[:, None]
    return total / B


@pytest.mark.parametrize("name", few(sorted(LAYERS, key="depthwise".__ne__), 2))
def test_the_block_is_the_fisher_matrix_of_each_group(name):
    model, x = built(name)
    matrix = model.layers[1].weight_matrices[0]
    expected = explicit(model, x, matrix.linear_map)
    optimizer = keras_kfc.KFC(fisher="exact", learning_rate=0.0)
    model.compile(optimizer, "mse")
    optimizer.build(model.trainable_variables)
    with keras_kfc.Capture() as capture:
        outputs = model(x, training=False)
    optimizer.update_factors(capture, "mse", np.zeros((B, 2)), outputs)
    (block,) = optimizer.blocks
    assert relative_error(block.full, expected) < 1e-9
    # Negative control: without what stands beside the diagonal it is something else.
    if expected.shape[1] > 1:
        diagonal = expected * np.eye(expected.shape[1])
        assert relative_error(block.full, diagonal) > 0.01


def test_its_inverse_is_that_of_each_matrix():
    model, x = built("depthwise")
    optimizer = keras_kfc.KFC(fisher="exact", damping=0.3)
    model.compile(optimizer, "mse")
    model.fit(x, np.zeros((B, 2)), batch_size=B, verbose=0)
    (block,) = optimizer.blocks
    full = block.full.numpy()
    shift = 0.3 * np.mean(np.diagonal(full, axis1=1, axis2=2))
    expected = np.linalg.inv(full + shift * np.eye(full.shape[1]))
    assert relative_error(block.state["full_inverse"], expected) < 1e-6


def test_in_training_batch_normalisation_scales_what_the_batch_normalises():
    model, x = built("batch norm")
    with keras_kfc.Capture() as capture:
        model(x, training=True)
    (use,) = next(iter(capture.records.values())).uses
    normalised = (x - x.mean((0, 1))) / np.sqrt(x.var((0, 1)) + 1e-3)
    assert relative_error(use.dense_inputs(), normalised) < 1e-9


def test_too_many_weights_in_a_group_are_refused_by_name():
    model = keras.Sequential([keras.Input((40,)), keras_kfc.layers.Dense(60)])
    optimizer = keras_kfc.KFC(structure="full")
    with pytest.raises(ValueError, match=r"`structure` must not be 'full'.*2460 weights"):
        optimizer.build(model.trainable_variables)


@pytest.mark.slow
def test_whole_blocks_train_under_xla_as_without():
    """Those of normalisations and of depthwise convolutions, whose operations XLA has to know."""

    def weights(jit_compile):
        keras.utils.set_random_seed(1)
        stack = [
            keras.Input((6, 6, 3)),
            layers.DepthwiseConv2D(3),
            layers.BatchNormalization(),
            layers.Flatten(),
            layers.LayerNormalization(),
            layers.Dense(2, activation="softmax"),
        ]
        model = keras_kfc.instrument(keras.Sequential(stack))
        optimizer = keras_kfc.KFC(seed=1, fisher="exact")
        model.compile(optimizer, "sparse_categorical_crossentropy", jit_compile=jit_compile)
        rng = np.random.default_rng(0)
        x, y = rng.normal(size=(8, 6, 6, 3)).astype("float32"), rng.integers(0, 2, 8)
        for _ in range(3):
            model.train_on_batch(x, y)
        return np.concatenate([w.ravel() for w in model.get_weights()])

    np.testing.assert_allclose(weights(True), weights(False), rtol=1e-3, atol=1e-4)
