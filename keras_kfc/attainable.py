"""The lowest loss that given targets allow, which Polyak's step size is measured from.

A cross-entropy of targets that are probabilities (soft labels, label smoothing, an
autoencoder's pixels) has the targets' entropy as its lowest value, and exceeds it by the
divergence of prediction from target, `L - H(y) = KL(y, p)`. Only the latter tells how far
training has got: a step in units of the loss itself would stay as large as the entropy
lets it be, however good the predictions.

Squared errors and other losses of regression are lowest where predictions equal targets;
cross-entropies of labels become zero. Of functions that a user wrote nothing is known.
"""

from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf
from keras.src.losses.loss import squeeze_or_expand_to_same_rank

from keras_kfc.likelihood import known_function
from keras_kfc.losses import LossTerm, reduced_loss


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
        function, options = known_function(term.loss)
        if term.y_true is None:
            return None
        if function in _ZERO:
            continue
        if function not in _BEST_PREDICTIONS:
            return None
        total += tf.cast(_lowest(term, function, options), tf.float32)
    return total


def _lowest(term: LossTerm, function: Any, options: dict[str, Any]) -> tf.Tensor:
    """The value of a loss whose predictions are the best ones for its targets."""
    # Broadcast as the loss does it, so that sample weights and masks fit the values.
    targets, _ = squeeze_or_expand_to_same_rank(
        tf.cast(term.y_true, term.loss.dtype), tf.cast(term.y_pred, term.loss.dtype)
    )
    best = _BEST_PREDICTIONS[function](targets, options)
    if "from_logits" in options:
        options = {**options, "from_logits": False}
    values = function(targets, best, **options)
    return reduced_loss(term, values, getattr(term.y_pred, "_keras_mask", None))


def _smoothed(targets, options):
    smoothing = options.get("label_smoothing", 0.0)
    classes = tf.cast(tf.shape(targets)[options.get("axis", -1)], targets.dtype)
    return targets * (1 - smoothing) + smoothing / classes


def _smoothed_binary(targets, options):
    smoothing = options.get("label_smoothing", 0.0)
    return targets * (1 - smoothing) + smoothing / 2


def _themselves(targets, options):
    del options
    return targets


_ZERO = {
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
    keras.losses.kl_divergence,
}
_BEST_PREDICTIONS = {
    keras.losses.categorical_crossentropy: _smoothed,
    keras.losses.binary_crossentropy: _smoothed_binary,
    keras.losses.poisson: _themselves,
    keras.losses.cosine_similarity: _themselves,
}
