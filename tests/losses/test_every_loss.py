"""Every loss trains with KFC at its defaults, whether its Fisher matrix is known or not."""

import inspect
import logging

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import few

import keras_kfc
from conftest import relative_error

RNG = np.random.default_rng(0)
X = RNG.normal(size=(48, 5)).astype("float32")
SCORES = (X @ RNG.normal(size=(5, 3))).astype("float32")
LABELS = SCORES.argmax(1)
ONE_HOT = np.eye(3, dtype="float32")[LABELS]
SIGNS = 2 * ONE_HOT - 1
POSITIVE = np.exp(SCORES / 4)
SEQUENCES = RNG.normal(size=(48, 6, 5)).astype("float32")
WORDS = (1 + (SEQUENCES[:, :2, 0] > 0)).astype("int32")

# Activation of the output layer, and targets that a linear layer can learn.
CASES = {
    "BinaryCrossentropy": ("sigmoid", ONE_HOT),
    "BinaryFocalCrossentropy": ("sigmoid", ONE_HOT),
    "CTC": (None, WORDS),
    "CategoricalCrossentropy": ("softmax", ONE_HOT),
    "CategoricalFocalCrossentropy": ("softmax", ONE_HOT),
    "CategoricalGeneralizedCrossEntropy": ("softmax", LABELS),
    "CategoricalHinge": (None, ONE_HOT),
    "Circle": (None, LABELS),
    "CosineSimilarity": (None, SCORES),
    "Dice": ("sigmoid", ONE_HOT),
    "Hinge": (None, SIGNS),
    "Huber": (None, SCORES),
    "KLDivergence": ("softmax", ONE_HOT),
    "LogCosh": (None, SCORES),
    "MeanAbsoluteError": (None, SCORES),
    "MeanAbsolutePercentageError": (None, SCORES + 10),
    "MeanSquaredError": (None, SCORES),
    "MeanSquaredLogarithmicError": ("softplus", POSITIVE),
    "Poisson": ("softplus", POSITIVE),
    "SparseCategoricalCrossentropy": ("softmax", LABELS),
    "SquaredHinge": (None, SIGNS),
    "Tversky": ("sigmoid", ONE_HOT),
}
EMPIRICAL = {"CTC", "Circle", "Dice", "Tversky"}
# One of each kind; the others are tested every night.
SOME = ["Dice", "SparseCategoricalCrossentropy"]


def exported_losses():
    members = inspect.getmembers(keras.losses, inspect.isclass)
    return {name for name, kind in members if issubclass(kind, keras.losses.Loss) and kind.call} - {
        "Loss"
    }


def history_of(loss, targets, activation=None, inputs=X, epochs=40, **arguments):
    """Losses of the epochs, and the optimizer."""
    keras.utils.set_random_seed(1)
    model = keras.Sequential(
        [keras.Input(inputs.shape[1:]), keras_kfc.layers.Dense(3, activation=activation)]
    )
    optimizer = keras_kfc.KFC(seed=1, **arguments)
    model.compile(optimizer=optimizer, loss=loss)
    optimizer.build(model.trainable_variables)
    history = model.fit(inputs, targets, batch_size=24, epochs=epochs, verbose=0)
    assert int(optimizer.skipped_steps) == 0 and int(optimizer.rejected_factor_updates) == 0
    return history.history["loss"], optimizer


def falls(values):
    assert np.all(np.isfinite(values))
    return values[-1] < values[0] - 0.1 * abs(values[0])


def lines(caplog):
    return [r.getMessage() for r in caplog.records if r.name == "keras_kfc"]


def test_every_loss_of_keras_has_a_case():
    assert exported_losses() == set(CASES)


@pytest.mark.slow
@pytest.mark.parametrize("name", few(SOME + sorted(set(CASES) - set(SOME)), len(SOME)))
def test_every_loss_of_keras_trains(name, caplog):
    activation, targets = CASES[name]
    inputs = SEQUENCES if name == "CTC" else X
    loss = getattr(keras.losses, name)()
    with caplog.at_level(logging.INFO, "keras_kfc"):
        values, _ = history_of(loss, targets, activation, inputs)
    assert falls(values)
    told = [line for line in lines(caplog) if "empirical Fisher matrix" in line]
    assert len(told) == len(lines(caplog)) == (name in EMPIRICAL)
    assert all(f'loss="{loss.name}"' in line for line in told)


def in_batch_contrast(y_true, y_pred):
    """Outputs of one class should be more alike than those of others in the batch."""
    self = tf.eye(tf.shape(y_pred)[0])
    scores = tf.matmul(y_pred, y_pred, transpose_b=True) - 1e3 * self
    alike = tf.matmul(y_true, y_true, transpose_b=True) - self
    alike /= tf.reduce_sum(alike, axis=1, keepdims=True)
    return tf.nn.softmax_cross_entropy_with_logits(alike, scores)


def scalar(y_true, y_pred):
    return tf.reduce_mean(tf.square(y_true - y_pred))


def elementwise(y_true, y_pred):
    return tf.abs(y_true - y_pred)


def own_ctc(y_true, y_pred):
    """CTC's gradient has none of its own."""
    return 1.0 * keras.losses.ctc(y_true, y_pred)


class Own(keras.losses.Loss):
    def call(self, y_true, y_pred):
        return tf.reduce_mean(tf.square(y_true - y_pred) ** 2, axis=-1)


@pytest.mark.slow
@pytest.mark.parametrize("fisher", few(["sampled", "exact"], 1))
@pytest.mark.parametrize("loss", few([Own(), in_batch_contrast, scalar, elementwise], 1))
def test_losses_of_a_users_own_train_and_one_line_tells(loss, fisher, caplog):
    with caplog.at_level(logging.INFO, "keras_kfc"):
        values, _ = history_of(
            loss, ONE_HOT if loss is in_batch_contrast else SCORES, fisher=fisher
        )
    assert falls(values)
    (line,) = lines(caplog)
    name = getattr(loss, "name", None) or loss.__name__
    assert f'loss="{name}"' in line and "empirical Fisher matrix" in line
    assert ("twice" in line) == (loss is own_ctc)


def gamma_of(model, loss, targets, fisher, **compiled):
    optimizer = keras_kfc.KFC(0.0, fisher=fisher, seed=1, weight_sharing="expand")
    model.compile(optimizer=optimizer, loss=loss, **compiled)
    optimizer.build(model.trainable_variables)
    model.train_on_batch(X, targets)
    return {block.path.split("/")[-1]: block.gamma[0].numpy() for block in optimizer.blocks}


def one_layer():
    keras.utils.set_random_seed(1)
    return keras.Sequential([keras.Input((5,)), keras_kfc.layers.Dense(3, name="head")])


@pytest.mark.nightly
@pytest.mark.parametrize("loss", few([in_batch_contrast, scalar], 1))
def test_what_depends_on_the_whole_batch_has_the_empirical_fisher(loss):
    targets = ONE_HOT if loss is in_batch_contrast else SCORES
    exact, empirical = (
        gamma_of(one_layer(), loss, targets, fisher)["head"] for fisher in ("exact", "empirical")
    )
    outputs = tf.constant(one_layer()(X).numpy())
    with tf.GradientTape() as tape:
        tape.watch(outputs)
        value = tf.reduce_mean(loss(targets, outputs))
    derivatives = len(X) * tape.gradient(value, outputs).numpy()
    assert relative_error(exact, derivatives.T @ derivatives / len(X)) < 1e-4
    assert relative_error(exact, empirical) < 1e-4


@pytest.mark.slow
def test_other_outputs_keep_their_fisher_matrix(caplog):
    keras.utils.set_random_seed(1)
    inputs = keras.Input((5,))
    outputs = {
        name: keras_kfc.layers.Dense(3, name=name)(inputs) for name in ("known", "whole_batch")
    }
    model = keras.Model(inputs, outputs)
    residual = model(X)["whole_batch"].numpy() - SCORES
    with caplog.at_level(logging.INFO, "keras_kfc"):
        gammas = gamma_of(
            model,
            {"known": "mse", "whole_batch": scalar},
            dict.fromkeys(outputs, SCORES),
            "exact",
        )
    assert relative_error(gammas["known"], 2 / 3 * np.eye(3)) < 1e-5
    derivatives = 2 / 3 * residual
    assert relative_error(gammas["whole_batch"], derivatives.T @ derivatives / len(X)) < 1e-4
    assert len(lines(caplog)) == 1


@pytest.mark.nightly
@pytest.mark.parametrize("reduction", few(["none", None], 1))
def test_losses_that_are_not_reduced_train_on_their_sum(reduction):
    """As with any optimizer in Keras, which differentiates the sum of a vector."""
    weights = []
    for kind in (reduction, "sum"):
        keras.utils.set_random_seed(1)
        model = one_layer()
        model.compile(
            optimizer=keras_kfc.KFC(seed=1), loss=keras.losses.MeanSquaredError(reduction=kind)
        )
        model.optimizer.build(model.trainable_variables)
        history = model.fit(X, SCORES, batch_size=24, epochs=8, shuffle=False, verbose=0)
        assert falls(history.history["loss"])
        weights.append(np.concatenate([w.ravel() for w in model.get_weights()]))
    assert relative_error(*weights) < 1e-5


@pytest.mark.slow
def test_a_scalar_loss_beside_one_that_is_not_reduced_counts_once_for_each_value():
    """Keras adds it to each of them."""
    keras.utils.set_random_seed(1)
    inputs = keras.Input((5,))
    outputs = {name: keras_kfc.layers.Dense(3, name=name)(inputs) for name in ("mean", "each")}
    model = keras.Model(inputs, outputs)
    mse = keras.losses.MeanSquaredError
    gammas = gamma_of(
        model,
        {"mean": mse(), "each": mse(reduction="none")},
        dict.fromkeys(outputs, SCORES),
        "exact",
    )
    for gamma in gammas.values():
        assert relative_error(gamma, len(X) * 2 / 3 * np.eye(3)) < 1e-5


def test_factors_without_targets_need_a_loss_that_can_do_without():
    for loss in ("huber", scalar, keras.losses.Dice()):
        with pytest.raises(ValueError, match=r"`y` is needed.*y=None, loss="):
            keras_kfc.kronecker_factors(one_layer(), X, loss=loss)
        assert keras_kfc.kronecker_factors(one_layer(), X, SCORES, loss=loss)
    (factors,) = keras_kfc.kronecker_factors(
        one_layer(), X, loss="mean_squared_logarithmic_error", fisher="exact"
    ).values()
    outputs = np.maximum(one_layer()(X).numpy(), 0)
    expected = np.diag(np.mean(np.where(outputs > 0, 2 / 3 / (1 + outputs) ** 2, 0), axis=0))
    assert relative_error(factors.gamma, expected) < 1e-5
