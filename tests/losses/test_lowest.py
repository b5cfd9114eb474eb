"""The lowest loss that targets allow, against its definition and Keras's own losses."""

import dataclasses

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import squared_fisher_norm

import keras_kfc
from keras_kfc._compat.keras_internals import compile_loss
from keras_kfc.losses.lowest import loss_lower_bound
from keras_kfc.losses.terms import loss_terms

RNG = np.random.default_rng(0)
SOFT = RNG.dirichlet(np.ones(4), size=6).astype("float32")
PIXELS = RNG.uniform(size=(6, 4)).astype("float32")
WEIGHTS = RNG.uniform(0.5, 2, size=6).astype("float32")


def attainable(loss, y_true, y_pred, sample_weight=None):
    """As the optimizer computes it."""
    terms = loss_terms(compile_loss(loss), y_true, y_pred, sample_weight)
    return float(loss_lower_bound(terms))


def entropy(p):
    """`-Σ p log p` over the last axis, in float64."""
    p = np.asarray(p, "float64")
    return -np.sum(np.where(p > 0, p * np.log(np.where(p > 0, p, 1)), 0), axis=-1)


def binary_entropy(p):
    return np.mean(entropy(np.stack([p, 1 - np.asarray(p, "float64")], -1)), axis=-1)


def test_soft_labels_have_their_entropy_as_lowest_cross_entropy():
    value = attainable(keras.losses.CategoricalCrossentropy(), SOFT, np.full((6, 4), 0.25, "f"))
    np.testing.assert_allclose(value, entropy(SOFT).mean(), rtol=1e-5)


def test_pixels_have_their_entropy_as_lowest_binary_cross_entropy():
    value = attainable(keras.losses.BinaryCrossentropy(), PIXELS, np.full((6, 4), 0.5, "f"))
    np.testing.assert_allclose(value, binary_entropy(PIXELS).mean(), rtol=1e-5)


def test_sample_weights_and_reduction_are_those_of_the_loss():
    loss = keras.losses.BinaryCrossentropy(reduction="sum")
    value = attainable(loss, PIXELS, np.full((6, 4), 0.5, "f"), WEIGHTS)
    np.testing.assert_allclose(value, np.sum(WEIGHTS * binary_entropy(PIXELS)), rtol=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("from_logits", [False, True])
@pytest.mark.parametrize("binary", [False, True])
def test_no_prediction_does_better_and_one_does_as_well(binary, from_logits, smoothing):
    """Against Keras's own loss, at the best prediction and at many others."""
    kind = keras.losses.BinaryCrossentropy if binary else keras.losses.CategoricalCrossentropy
    loss = kind(from_logits=from_logits, label_smoothing=smoothing)
    targets = PIXELS if binary else SOFT
    best = targets * (1 - smoothing) + smoothing * (0.5 if binary else 0.25)
    rng = np.random.default_rng(1)

    def given(probabilities):
        if not from_logits:
            return probabilities
        return np.log(probabilities / (1 - probabilities) if binary else probabilities)

    value = attainable(loss, targets, given(np.full_like(best, 0.25)), WEIGHTS)
    at_best = float(loss(targets, given(best), WEIGHTS))
    np.testing.assert_allclose(value, at_best, rtol=1e-5)
    for _ in range(20):
        other = np.clip(best + rng.normal(scale=0.05, size=best.shape), 0.01, 0.99).astype("f")
        if not binary:
            other /= other.sum(-1, keepdims=True)
        assert float(loss(targets, given(other), WEIGHTS)) > value


@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_rows_without_a_class_add_nothing(weights):
    """As `tf.one_hot(-1, 4)` and padded batches have them."""
    targets = SOFT.copy()
    targets[2] = 0
    loss = keras.losses.CategoricalCrossentropy(from_logits=True)
    weighted = np.ones(6) if weights is None else weights
    expected = np.mean(weighted * entropy(targets))
    value = attainable(loss, targets, np.zeros((6, 4), "f"), weights)
    np.testing.assert_allclose(value, expected, rtol=1e-5)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_labels_in_half_precision_can_be_met(dtype):
    loss = keras.losses.BinaryCrossentropy(from_logits=True, dtype=dtype)
    labels = np.eye(4, dtype="f")[[0, 3, 1, 2, 2, 0]]
    assert attainable(loss, labels, tf.zeros((6, 4), dtype)) == 0


def test_smoothing_counts_classes_as_keras_does():
    """Which is along the last axis, whichever holds the classes."""
    loss = keras.losses.CategoricalCrossentropy(axis=1, label_smoothing=0.2)
    targets = np.moveaxis(np.eye(3, dtype="f")[RNG.integers(0, 3, size=(2, 50))], -1, 1)
    smoothed = targets * 0.8 + 0.2 / 50
    best = smoothed / smoothed.sum(1, keepdims=True)
    value = attainable(loss, targets, best)
    np.testing.assert_allclose(value, float(loss(targets, best)), rtol=1e-5)


def test_a_divergence_from_targets_of_any_size():
    loss = keras.losses.KLDivergence()
    targets = 0.5 * np.eye(4, dtype="f")
    value = attainable(loss, targets, targets)
    np.testing.assert_allclose(value, float(loss(targets, np.eye(4, dtype="f"))), rtol=1e-4)


def test_a_loss_that_cannot_be_hashed():
    @dataclasses.dataclass
    class Own:
        factor: float

        def __call__(self, y_true, y_pred):
            return self.factor * tf.reduce_mean(tf.abs(y_true - y_pred), axis=-1)

    assert loss_lower_bound(loss_terms(compile_loss(Own(2.0)), PIXELS, PIXELS)) is None


def test_classes_on_another_axis_and_a_mask():
    loss = keras.losses.CategoricalCrossentropy(axis=1)
    targets = np.moveaxis(RNG.dirichlet(np.ones(3), size=(2, 5)).astype("f"), -1, 1)
    outputs = tf.fill((2, 3, 5), 1 / 3)
    mask = np.array([[1, 1, 0, 0, 1], [0, 1, 1, 1, 1]], bool)
    outputs._keras_mask = tf.constant(mask)
    expected = entropy(np.moveaxis(targets, 1, -1))[mask].mean()
    np.testing.assert_allclose(attainable(loss, targets, outputs), expected, rtol=1e-5)


def test_outputs_add_up_with_their_weights():
    inputs = keras.Input((3,))
    outputs = [keras.layers.Dense(4, name=name)(inputs) for name in ("a", "b")]
    model = keras.Model(inputs, outputs)
    losses = [
        keras.losses.BinaryCrossentropy(from_logits=True),
        keras.losses.CategoricalCrossentropy(from_logits=True),
    ]
    model.compile(loss=losses, loss_weights=[0.5, 3.0])
    predictions = model(np.zeros((6, 3), "f"))
    model._compile_loss.build([PIXELS, SOFT], predictions)
    terms = loss_terms(model._compile_loss, [PIXELS, SOFT], predictions)
    expected = 0.5 * binary_entropy(PIXELS).mean() + 3 * entropy(SOFT).mean()
    np.testing.assert_allclose(float(loss_lower_bound(terms)), expected, rtol=1e-5)


@pytest.mark.parametrize(
    "loss, y_true",
    [
        (keras.losses.SparseCategoricalCrossentropy(), np.array([0, 3, 1, 2, 2, 0])),
        (keras.losses.CategoricalCrossentropy(), np.eye(4, dtype="f")[[0, 3, 1, 2, 2, 0]]),
        (keras.losses.BinaryCrossentropy(), np.eye(4, dtype="f")[[0, 3, 1, 2, 2, 0]]),
        (keras.losses.MeanSquaredError(), PIXELS),
        (keras.losses.MeanAbsoluteError(), PIXELS),
    ],
    ids=["sparse", "one-hot", "binary", "squared", "absolute"],
)
def test_labels_and_errors_can_be_met(loss, y_true):
    value = attainable(loss, y_true, np.full((6, 4), 0.25, "f"))
    assert abs(value) < 2e-6


def test_of_a_function_that_a_user_wrote_nothing_is_known():
    def own(y_true, y_pred):
        return tf.reduce_mean(tf.abs(y_true - y_pred), axis=-1)

    class Subclass(keras.losses.MeanSquaredError):
        def call(self, y_true, y_pred):
            return super().call(y_true, y_pred) - 1

    for loss in (own, Subclass()):
        terms = loss_terms(compile_loss(loss), PIXELS, PIXELS)
        assert loss_lower_bound(terms) is None
    assert loss_lower_bound(loss_terms(compile_loss("mse"), None, tf.constant(PIXELS))) is None


@pytest.mark.parametrize("name", ["poisson", "cosine_similarity", "huber", "kl_divergence"])
def test_other_losses_are_lowest_where_predictions_equal_targets(name):
    loss = keras.losses.get(name)
    value = attainable(loss, SOFT, np.full((6, 4), 0.25, "f"))
    np.testing.assert_allclose(value, np.mean(loss(SOFT, SOFT)), rtol=1e-5, atol=1e-6)
    for other in (0.9 * SOFT + 0.02, np.roll(SOFT, 1, axis=-1)):
        assert np.mean(loss(SOFT, other)) > value


def test_labels_without_the_axis_of_the_outputs():
    """Keras takes labels (B,) for outputs (B, 1); weights are those of examples."""
    targets = PIXELS[:, 0]
    loss = keras.losses.BinaryCrossentropy()
    value = attainable(loss, targets, np.full((6, 1), 0.5, "f"), WEIGHTS)
    reached = float(loss(targets, targets[:, None], WEIGHTS))
    np.testing.assert_allclose(value, reached, rtol=1e-5)


@pytest.mark.parametrize("soft", [True, False])
def test_the_trust_region_is_a_part_of_what_is_above_the_lowest_loss(soft):
    """One step from rest has a quadratic form of `norm_constraint` times the divergence."""
    rng = np.random.default_rng(2)
    inputs = rng.normal(size=(32, 5)).astype("float32")
    targets = rng.uniform(size=(32, 3)).astype("float32")
    if not soft:
        targets = np.round(targets)
    keras.utils.set_random_seed(1)
    model = keras.Sequential([keras.Input((5,)), keras_kfc.layers.Dense(3, activation="sigmoid")])
    optimizer = keras_kfc.KFC(
        10.0,
        damping=1e-3,
        polyak_scaling=None,
        norm_constraint=1e-5,
        nesterov=False,
        weight_decay=None,
        seed=3,
    )
    model.compile(optimizer=optimizer, loss="binary_crossentropy")
    p = model.predict(inputs, verbose=0).astype("float64")
    divergence = np.mean(-targets * np.log(p) - (1 - targets) * np.log(1 - p)) - np.mean(
        binary_entropy(targets)
    )
    before = model.layers[0].get_weights()
    model.train_on_batch(inputs, targets)
    after = model.layers[0].get_weights()
    (block,) = optimizer.blocks
    step = [a - b for a, b in zip(after, before, strict=True)]
    quadratic = squared_fisher_norm(block, step)
    np.testing.assert_allclose(quadratic, 1e-5 * divergence, rtol=0.02)
