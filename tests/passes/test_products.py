"""Which gradients are known as products of two thin matrices, and what is made of them."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import few

import keras_kfc
from keras_kfc.curvature import products as by_rows
from keras_kfc.passes.products import products_in

layers = keras.layers
FOUND = {
    "dense": ((5,), lambda: layers.Dense(3)),
    "dense without a bias": ((5,), lambda: layers.Dense(3, use_bias=False)),
    "dense on sequences": ((4, 5), lambda: layers.Dense(3)),
    "convolution": ((6, 5, 2), lambda: layers.Conv2D(3, 3, strides=2, padding="same")),
    "in one dimension": ((6, 2), lambda: layers.Conv1D(3, 3, padding="causal")),
    "in three dimensions": ((3, 4, 5, 2), lambda: layers.Conv3D(3, 2)),
    "einsum": ((4, 5), lambda: layers.EinsumDense("abc,cd->abd", (None, 3), bias_axes="d")),
    "in half precision": ((5,), lambda: layers.Dense(3, dtype="mixed_bfloat16")),
}
LEFT = {
    "a regulariser": ((5,), lambda: layers.Dense(3, kernel_regularizer="l2")),
    "a regulariser of the bias": ((5,), lambda: layers.Dense(3, bias_regularizer="l2")),
    "a table": ((5,), lambda: layers.Embedding(7, 3)),
    "a normalisation": ((5,), lambda: layers.BatchNormalization()),
}


def traced(shape, layer, change=lambda gradients: gradients, uses=1):
    """What is found in a traced step: for each product its gradient and `Aᵀ E`."""
    inputs = keras.Input(shape)
    outputs = inputs
    for _ in range(uses):
        outputs = layer(outputs)
    model = keras_kfc.instrument(keras.Model(inputs, outputs))
    found = []

    @tf.function(autograph=False)
    def step(x):
        with tf.GradientTape() as tape, keras_kfc.Capture() as capture:
            result = tf.cast(model(x, training=True), tf.float32)
            loss = tf.reduce_sum(tf.sin(1.3 * result)) + sum(model.losses)
        variables = model.trainable_variables
        gradients = change(tape.gradient(loss, [v.value for v in variables]))
        for product in products_in(capture, gradients, variables).values():
            found.append(product)
        values = []
        for product in found:
            inputs, derivatives = product.rows(tf.float32)
            given = (*map(tf.convert_to_tensor, product.gradients), None)[:2]
            stacked = product.matrix.linear_map.stack_bias(*given)
            values.append((stacked, tf.matmul(inputs, derivatives, transpose_a=True)))
        return values

    values = step(tf.constant(np.random.default_rng(0).uniform(0, 6, (2, *shape)), tf.float32))
    return found, values


@pytest.mark.parametrize("name", FOUND)
def test_a_gradient_is_the_product_of_its_rows(name):
    shape, make = FOUND[name]
    found, values = traced(shape, make())
    (pair,) = values
    half = "half" in name
    np.testing.assert_allclose(*pair, rtol=0.02 if half else 1e-4, atol=0.02 if half else 1e-5)
    assert found[0].batch_size == 2


@pytest.mark.parametrize("name", LEFT)
def test_gradients_that_hold_more_are_left_whole(name):
    shape, make = LEFT[name]
    assert not traced(shape, make())[0]


@pytest.mark.parametrize(
    "change",
    [
        lambda gradients: [0.5 * g for g in gradients],
        lambda gradients: [tf.clip_by_value(g, -0.1, 0.1) for g in gradients],
        lambda gradients: [g + tf.constant(1.0) for g in gradients],
    ],
    ids=["scaled", "clipped", "moved"],
)
def test_changed_gradients_are_left_whole(change):
    assert not traced((5,), layers.Dense(3), change)[0]


def test_a_layer_that_is_used_twice_is_left_whole():
    assert not traced((5,), layers.Dense(5), uses=2)[0]


def fitted(monkeypatch, rows, batch_size=16, **options):
    """Weights after some steps, and in how many of the layers rows were preconditioned."""
    calls = []
    multiply = keras_kfc.curvature.kronecker.KroneckerBlock.multiply_product

    def counted(block, *factors):
        calls.append(block.path)
        return multiply(block, *factors)

    with monkeypatch.context() as patch:
        patch.setattr(by_rows, "_WORTH", 0.0 if rows else np.inf)
        patch.setattr(by_rows, "_CHEAPER", 1e9)
        block = keras_kfc.curvature.kronecker.KroneckerBlock
        patch.setattr(block, "multiply_product", counted)
        keras.utils.set_random_seed(5)
        inputs = keras.Input((8, 8, 2))
        tensor = layers.Conv2D(6, 3, activation="relu")(inputs)
        tensor = layers.Conv2D(8, 1, activation="relu")(tensor)
        tensor = layers.Dense(20, "relu")(layers.Flatten()(tensor))
        model = keras_kfc.instrument(keras.Model(inputs, layers.Dense(3, "softmax")(tensor)))
        model.compile(
            keras_kfc.KFC(seed=1, max_factor_dim=40, fisher="exact", **options),
            "sparse_categorical_crossentropy",
        )
        rng = np.random.default_rng(0)
        x, y = rng.normal(size=(48, 8, 8, 2)).astype("float32"), rng.integers(0, 3, 48)
        if batch_size is None:
            for part in range(3):
                model.train_on_batch(x[16 * part : 16 * part + 16], y[16 * part : 16 * part + 16])
        else:
            model.fit(x, y, batch_size=batch_size, shuffle=False, verbose=0)
    return np.concatenate([w.ravel() for w in model.get_weights()]), len(set(calls))


@pytest.mark.parametrize("batch_size", few([None, 16], 0), ids=["known", "unknown"])
def test_steps_by_rows_are_those_by_gradients(monkeypatch, batch_size):
    """Also of layers whose factors are cut; batch sizes that are known, and not, in the graph."""
    whole, none = fitted(monkeypatch, False, batch_size)
    rows, four = fitted(monkeypatch, True, batch_size)
    assert (none, four) == (0, 4)
    np.testing.assert_allclose(rows, whole, rtol=1e-4, atol=1e-5)


@pytest.mark.nightly
def test_what_keras_does_to_gradients_is_seen(monkeypatch):
    for options in ({"global_clipnorm": 1.0}, {"loss_scale_factor": 4.0}):
        assert fitted(monkeypatch, True, **options)[1] == 0


def test_rows_are_taken_where_they_are_cheaper():
    """785 x 1000 at 32 examples, but not at 4,096, nor a convolution of 28 x 28 positions."""
    dense = keras_kfc.layers.Dense(1000)
    dense.build((None, 784))
    model = keras.Sequential([keras.Input((28, 28, 8)), keras_kfc.layers.Conv2D(64, 5)])
    optimizer = keras_kfc.KFC()
    optimizer.build([*dense.trainable_variables, *model.trainable_variables])
    wide, convolution = optimizer.blocks

    class Product:
        def __init__(self, positions, batch_size=None):
            self.positions, self.batch_size = positions, batch_size

    assert 32 < by_rows._most_examples([(wide, Product(1))]) < 4096
    assert by_rows._most_examples([(convolution, Product(24 * 24))]) < 1
    assert by_rows._is_worth_it(wide, Product(1)) and by_rows._is_worth_it(wide, Product(1, 32))
    assert not by_rows._is_worth_it(wide, Product(1, 4096))
    assert not by_rows._is_worth_it(convolution, Product(24 * 24))
    assert not by_rows._is_worth_it(wide, Product(None))
