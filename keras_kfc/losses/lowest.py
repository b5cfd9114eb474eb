"""The lowest loss that given targets allow, which Polyak's step size is measured from.

A cross-entropy of targets that are probabilities (soft labels, label smoothing, an
autoencoder's pixels) has the targets' entropy as its lowest value, and exceeds it by the
divergence of prediction from target, `L - H(y) = KL(y, p)`. Only the latter tells how far
training has got: a step in units of the loss itself would stay as large as the entropy
lets it be, however good the predictions.

Squared errors and other losses of regression are lowest where predictions equal targets;
cross-entropies of labels become zero. Of functions that a user wrote nothing is known.
"""

from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_kfc._compat.keras_internals import mask_of, of_the_same_rank
from keras_kfc.losses.terms import LossTerm, known_function, reduced_loss


def attainable_loss(terms: Sequence[LossTerm]) -> tf.Tensor | None:
    """The lowest value that the loss of a model could take on these targets.

    Args:
        terms: The model's loss terms.

    Returns:
        A float32 scalar, in the units of the compiled loss, divided by the number of
        replicas as Keras does, or None if that is not known.
    """
    total = tf.zeros(())
    for term in terms:
        if term.y_true is None:
            return None
        function, options = known_function(term.loss)
        if any(function is zero for zero in _ZERO):
            continue
        rule = next((rule for known, rule in _LOWEST_VALUES if function is known), None)
        if rule is None:
            return None
        values = rule(_targets_as_broadcast(term), options)
        mask = mask_of(term.y_pred)
        total += tf.cast(reduced_loss(term, values, mask), tf.float32)
    return total


def _targets_as_broadcast(term: LossTerm) -> tf.Tensor:
    """Targets of the rank that the loss gives them, so that weights and masks fit."""
    dtype = tf.as_dtype(term.loss.dtype)
    # An epsilon of half precision may be none.
    dtype = tf.float32 if dtype.size < 4 else dtype
    targets, _ = of_the_same_rank(tf.cast(term.y_true, dtype), tf.convert_to_tensor(term.y_pred))
    return targets


def _entropy(targets, options):
    """Of targets that may add up to anything, since predictions are normalised."""
    axis = options.get("axis", -1)
    smoothing = options.get("label_smoothing", 0.0)
    # Keras counts the last axis, whichever holds the classes.
    classes = tf.cast(tf.shape(targets)[-1], targets.dtype)
    targets = targets * (1 - smoothing) + smoothing / classes
    total = tf.reduce_sum(targets, axis)
    return _x_log_x(total) - tf.reduce_sum(_x_log_x(targets), axis)


def _binary_entropy(targets, options):
    smoothing = options.get("label_smoothing", 0.0)
    targets = tf.clip_by_value(targets * (1 - smoothing) + smoothing / 2, 0, 1)
    return -tf.reduce_mean(_x_log_x(targets) + _x_log_x(1 - targets), options.get("axis", -1))


def _divergence_by_size(targets, options):
    del options
    return _x_log_x(tf.reduce_sum(targets, -1))


def _poisson(targets, options):
    del options
    return tf.reduce_mean(targets - _x_log_x(targets), -1)


def _cosine(targets, options):
    return keras.losses.cosine_similarity(targets, targets, **options)


def _x_log_x(x):
    return tf.math.xlogy(x, x)


_ZERO = (
    keras.losses.sparse_categorical_crossentropy,
    keras.losses.mean_squared_error,
    keras.losses.mean_absolute_error,
    keras.losses.mean_absolute_percentage_error,
    keras.losses.mean_squared_logarithmic_error,
    keras.losses.huber,
    keras.losses.log_cosh,
    keras.losses.hinge,
    keras.losses.squared_hinge,
    keras.losses.categorical_hinge,
    keras.losses.categorical_generalized_cross_entropy,
)
_LOWEST_VALUES: tuple[tuple[Any, Callable[[tf.Tensor, dict[str, Any]], tf.Tensor]], ...] = (
    (keras.losses.categorical_crossentropy, _entropy),
    (keras.losses.binary_crossentropy, _binary_entropy),
    (keras.losses.kl_divergence, _divergence_by_size),
    (keras.losses.poisson, _poisson),
    (keras.losses.cosine_similarity, _cosine),
)
