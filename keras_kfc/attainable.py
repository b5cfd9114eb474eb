"""The lowest loss that given targets allow: what is above it is the trust region's unit.

A cross-entropy of targets that are probabilities (soft labels, label smoothing, an
autoencoder's pixels) has the targets' entropy as its lowest value, and exceeds it by the
divergence of prediction from target, `L - H(y) = KL(y, p)`. Only the latter tells how far
training has got. Step sizes in units of the loss itself would stay as large as the entropy
lets them be, however good the predictions.

Squared errors and cross-entropies of labels can become zero. Of other losses nothing is
known; zero is assumed.
"""

from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf
from keras.src.losses.loss import squeeze_or_expand_to_same_rank

from keras_kfc.likelihood import known_function
from keras_kfc.losses import LossTerm, reduced_loss


def attainable_loss(terms: Sequence[LossTerm]) -> tf.Tensor:
    """The lowest value that the loss of a model could take on these targets.

    Args:
        terms: The model's loss terms.

    Returns:
        A float32 scalar, in the units of the compiled loss, divided by the number of
        replicas as Keras does.
    """
    total = tf.zeros(())
    for term in terms:
        function, options = known_function(term.loss)
        if term.y_true is not None and function in _BEST_PREDICTIONS:
            total += tf.cast(_entropy(term, function, options), tf.float32)
    return total


def _entropy(term: LossTerm, function: Any, options: dict[str, Any]) -> tf.Tensor:
    """The value of a cross-entropy whose predictions are its targets."""
    # Broadcast as the loss does it, so that sample weights and masks fit the values.
    targets, _ = squeeze_or_expand_to_same_rank(
        tf.cast(term.y_true, term.loss.dtype), tf.cast(term.y_pred, term.loss.dtype)
    )
    best = _BEST_PREDICTIONS[function](targets, options)
    values = function(targets, best, **{**options, "from_logits": False})
    return reduced_loss(term, values, getattr(term.y_pred, "_keras_mask", None))


def _smoothed(targets, options):
    smoothing = options.get("label_smoothing", 0.0)
    classes = tf.cast(tf.shape(targets)[options.get("axis", -1)], targets.dtype)
    return targets * (1 - smoothing) + smoothing / classes


def _smoothed_binary(targets, options):
    smoothing = options.get("label_smoothing", 0.0)
    return targets * (1 - smoothing) + smoothing / 2


_BEST_PREDICTIONS = {
    keras.losses.categorical_crossentropy: _smoothed,
    keras.losses.binary_crossentropy: _smoothed_binary,
}
