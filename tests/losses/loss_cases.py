"""Losses with data and matrices of second derivatives by hand, in float64."""

import keras
import numpy as np
import tensorflow as tf

from conftest import softmax
from keras_kfc._compat.keras_internals import compile_loss
from keras_kfc.losses.families import family_of
from keras_kfc.losses.terms import LossTerm

losses = keras.losses
RNG = np.random.default_rng(3)
WEIGHTS = np.array([0.5, 2.0, 0.0, 1.5, 3.0])
REAL = RNG.normal(size=(5, 3))
OUTPUTS = REAL + np.array([0.3, 4.0, 0.2]) * RNG.normal(size=(5, 3))
LABELS = np.array([0, 2, 1, 1, 0])
ONE_HOT = np.eye(3)[LABELS]
POSITIVE = np.exp(OUTPUTS / 4)
COUNTS = RNG.poisson(2.0, size=(5, 3)).astype("float64")
SIGNS = np.sign(REAL)


def hessian_blocks(loss, y, outputs, weights=None):
    """The Hessian of the weighted Keras loss in each example's outputs, `(B, D, D)`."""
    point = tf.constant(outputs)
    with tf.GradientTape(persistent=True) as outer:
        outer.watch(point)
        with tf.GradientTape() as inner:
            inner.watch(point)
            value = tf.reduce_sum(loss(y, point, weights))
        gradient = inner.gradient(value, point)
    hessian = outer.jacobian(gradient, point, experimental_use_pfor=False).numpy()
    count, size = len(outputs), outputs[0].size
    hessian = hessian.reshape(count, size, count, size)
    return np.stack([hessian[i, :, i] for i in range(count)])


def positive_part(blocks):
    values, vectors = np.linalg.eigh(blocks)
    return np.einsum("bij,bj,bkj->bik", vectors, np.maximum(values, 0), vectors)


def diagonals(second_derivatives):
    """Blocks of the mean loss, whose values are means over the outputs, with the weights."""
    size = len(second_derivatives[0])
    return np.stack(
        [
            weight / len(WEIGHTS) * np.diag(row) / size
            for weight, row in zip(WEIGHTS, second_derivatives, strict=True)
        ]
    )


def own_squared(y_true, y_pred):
    return tf.reduce_mean(tf.square(y_true - y_pred), axis=-1)


def own_unreduced(y_true, y_pred):
    return tf.math.softplus(y_pred - y_true)


def own_joint(y_true, y_pred):
    return tf.reduce_logsumexp(y_pred, axis=-1) ** 2 - tf.reduce_sum(y_true * y_pred, axis=-1)


def own_pinball(y_true, y_pred):
    error = y_true - y_pred
    return tf.reduce_mean(tf.maximum(0.9 * error, -0.1 * error), axis=-1)


def laplace(slopes, values):
    """`g² / (2 m)` for functions f of one output with slopes g, m the weighted mean of f."""
    typical = np.average(np.mean(values, axis=1), weights=WEIGHTS)
    return diagonals(slopes**2 / (2 * typical))


RESIDUAL = OUTPUTS - REAL
MARGIN = 1 - SIGNS * OUTPUTS
CASES = {
    # A loss, its targets and outputs, and the matrix that it must have; None for the Hessian.
    "sparse": (losses.SparseCategoricalCrossentropy(from_logits=True), LABELS, OUTPUTS, None),
    "categorical": (losses.CategoricalCrossentropy(from_logits=True), ONE_HOT, OUTPUTS, None),
    "binary": (losses.BinaryCrossentropy(from_logits=True), ONE_HOT, OUTPUTS, None),
    "squared": (losses.MeanSquaredError(), REAL, OUTPUTS, None),
    "squared sum": (losses.MeanSquaredError(reduction="sum"), REAL, OUTPUTS, None),
    "squared none": (losses.MeanSquaredError(reduction="none"), REAL, OUTPUTS, None),
    "own squared": (own_squared, REAL, OUTPUTS, None),
    "own unreduced": (own_unreduced, REAL, OUTPUTS, None),
    "own joint": (own_joint, ONE_HOT, OUTPUTS, None),
    "focal": (losses.CategoricalFocalCrossentropy(from_logits=True), ONE_HOT, OUTPUTS, None),
    "cosine": (losses.CosineSimilarity(), REAL, OUTPUTS, "positive"),
    "dice of an example": (losses.Dice(axis=-1), ONE_HOT, POSITIVE, "positive"),
    "squared hinge": (losses.SquaredHinge(), SIGNS, np.clip(OUTPUTS, -0.9, 0.9), None),
    "huber": (
        losses.Huber(0.5, dtype="float64"),
        REAL,
        OUTPUTS,
        diagonals(np.minimum(1, 0.5 / np.abs(RESIDUAL))),
    ),
    "log cosh": (losses.LogCosh(), REAL, OUTPUTS, diagonals(np.tanh(RESIDUAL) / RESIDUAL)),
    "squared logarithm": (
        losses.MeanSquaredLogarithmicError(),
        COUNTS,
        POSITIVE,
        diagonals(2 / (1 + POSITIVE) ** 2),
    ),
    "poisson": (losses.Poisson(), COUNTS, POSITIVE, diagonals(1 / (POSITIVE + 1e-7))),
    "divergence": (
        losses.KLDivergence(),
        ONE_HOT,
        softmax(OUTPUTS),
        diagonals(3 / softmax(OUTPUTS)),
    ),
    "absolute": (
        losses.MeanAbsoluteError(),
        REAL,
        OUTPUTS,
        laplace(np.sign(RESIDUAL), np.abs(RESIDUAL)),
    ),
    "hinge": (
        losses.Hinge(),
        SIGNS,
        OUTPUTS,
        laplace(SIGNS * (MARGIN > 0), np.maximum(MARGIN, 0)),
    ),
    "own pinball": (
        own_pinball,
        REAL,
        OUTPUTS,
        laplace(np.where(RESIDUAL < 0, -0.9, 0.1), np.maximum(-0.9 * RESIDUAL, 0.1 * RESIDUAL)),
    ),
}


def part_and_matrix(case):
    loss, y, outputs, expected = CASES[case]
    if isinstance(loss, losses.Loss) and loss.dtype != "float64":
        # Keras losses compute in the float type of the time when they were made.
        loss = type(loss).from_config({**loss.get_config(), "dtype": "float64"})
    elif not isinstance(loss, losses.Loss):
        compiled = compile_loss(loss)
        compiled.build(tf.constant(y), tf.constant(outputs))
        loss = compiled._flat_losses[0].loss
    weights = WEIGHTS[:, None] if case == "own unreduced" else WEIGHTS
    if expected is None or isinstance(expected, str):
        blocks = hessian_blocks(loss, y, outputs, weights)
        lowest = np.linalg.eigvalsh(blocks).min()
        assert (lowest < -1e-3) == (expected == "positive")  # each is clipped or needs it not
        expected = positive_part(blocks)
    term = LossTerm(loss, tf.constant(y), tf.constant(outputs), tf.constant(weights))
    return family_of(term).part, expected


def examples(derivatives):
    """`(draws, B, D)` of a list with one tensor."""
    (tensor,) = derivatives
    return tensor.numpy().reshape(len(tensor), len(WEIGHTS), -1)
