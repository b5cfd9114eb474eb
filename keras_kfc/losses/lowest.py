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

import tensorflow as tf

from keras_kfc._compat.keras_internals import mask_of, of_the_same_rank
from keras_kfc.losses.api import kind_of
from keras_kfc.losses.terms import LossTerm, known_function, reduced_loss


def loss_lower_bound(terms: Sequence[LossTerm]) -> tf.Tensor | None:
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
        kind = kind_of(function)
        if kind is None or not kind.has_lowest:
            return None
        if kind.lowest is None:
            continue
        values = kind.lowest(_targets_as_broadcast(term), options)
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
