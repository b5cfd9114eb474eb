"""What the step size is told of directions: slopes of tables and of all else, mean squares."""

import keras
import numpy as np
import tensorflow as tf

import keras_kfc
from keras_kfc.optimizer.directions import Directions


def test_mean_squares_are_over_all_variables_of_a_block():
    rng = np.random.default_rng(0)
    kernel, bias, other = (rng.normal(size=size) for size in ((4, 3), (3,), (5, 2)))
    directions = Directions(
        {0: tf.constant(kernel), 1: tf.constant(bias), 3: tf.constant(other)}, {}, frozenset()
    )
    found = directions.mean_squares([[0, 1], [], [], [3]]).numpy()
    first = np.mean(np.concatenate([kernel.ravel(), bias]) ** 2)
    np.testing.assert_allclose(found, [first, 0, 0, np.mean(other**2)], rtol=1e-6)


def test_slopes_that_are_known_take_the_place_of_gradients():
    rng = np.random.default_rng(0)
    parts = {i: tf.constant(rng.normal(size=(3,))) for i in range(4)}
    gradients = {i: tf.constant(rng.normal(size=(3,))) for i in range(4)}
    slopes = {(0, 1): tf.constant(7.0), (2,): tf.constant(11.0)}
    directions = Directions(parts, {}, frozenset(), slopes)
    other = float(tf.tensordot(parts[3], gradients[3], 1))
    np.testing.assert_allclose(directions.slope(gradients, {0, 1, 2, 3}), 18 + other, rtol=1e-6)
    np.testing.assert_allclose(directions.slope(gradients, {0, 1, 3}), 7 + other, rtol=1e-6)
    half, cut = directions.shortened(
        0.5 * tf.cast(tf.sqrt(tf.reduce_mean(tf.square(parts[3]))), tf.float32), [[3]]
    )
    assert cut
    np.testing.assert_allclose(half.slope(gradients, {0, 1, 2}), 9, rtol=1e-6)


def test_rules_are_told_the_slope_of_tables_apart():
    """A head of zeros hands no derivative on to the table, so that its slope is 0."""
    keras.utils.set_random_seed(1)
    table, head = keras.layers.Embedding(6, 3), keras.layers.Dense(2)
    model = keras.Sequential([keras.Input((4,)), table, keras.layers.Flatten(), head])
    model = keras_kfc.instrument(model)
    model.compile(keras_kfc.KFC(seed=1, learning_rate=0.0), "mse", run_eagerly=True)
    tokens, targets = np.arange(8).reshape(2, 4) % 6, np.ones((2, 2))
    model.train_on_batch(tokens, targets)
    update, queries = model.optimizer.parts.update, []
    rates = update._rule.rates
    update._rule.rates = lambda query: (queries.append(query), rates(query))[1]
    model.train_on_batch(tokens, targets)
    kernel = model.layers[-1].kernel
    kernel.assign(tf.zeros_like(kernel))
    model.train_on_batch(tokens, targets)
    before, after = queries
    assert before.table_slope > 0 and before.slope > 0
    assert after.table_slope == 0 and after.slope > 0
    kernel_index = next(i for i, v in enumerate(model.trainable_variables) if v is kernel)
    assert before.tables.numpy().any() and not before.tables[kernel_index]
