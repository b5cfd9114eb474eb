"""Binary cross-entropies: each output is the probability of one event, or its logit."""

import keras
import tensorflow as tf

from keras_kfc.losses.api import Family, LossKind, Options, register
from keras_kfc.losses.likelihood import Likelihood, uniform, x_log_x
from keras_kfc.losses.terms import LossTerm


class Bernoulli(Likelihood):
    """Independent events."""

    def draw(self, seed: tf.Tensor) -> tf.Tensor:
        """The derivative at events that are drawn with their probabilities."""
        probabilities = self._probabilities()
        positive = uniform(tf.shape(probabilities), seed, probabilities.dtype) < probabilities
        if self.from_logits:
            return probabilities - tf.cast(positive, probabilities.dtype)
        return tf.where(
            positive,
            -tf.math.divide_no_nan(1.0, probabilities),
            tf.math.divide_no_nan(1.0, 1.0 - probabilities),
        )

    def times_root(self, z: tf.Tensor) -> tf.Tensor:
        """Times the deviation of the drawn event, `sqrt(p (1 - p))`, or one over it."""
        probabilities = self._probabilities()
        deviation = tf.sqrt(probabilities * (1 - probabilities))
        if self.from_logits:
            return z * deviation
        return z * tf.math.divide_no_nan(1.0, deviation)

    def _probabilities(self) -> tf.Tensor:
        return tf.sigmoid(self.outputs) if self.from_logits else self.outputs


def _family(term: LossTerm, options: Options) -> Family:
    from_logits = bool(options.get("from_logits", False))
    return Family(Bernoulli(term, options.get("axis", -1), from_logits))


def _entropy(targets: tf.Tensor, options: Options) -> tf.Tensor:
    smoothing = options.get("label_smoothing", 0.0)
    targets = tf.clip_by_value(targets * (1 - smoothing) + smoothing / 2, 0, 1)
    return -tf.reduce_mean(x_log_x(targets) + x_log_x(1 - targets), options.get("axis", -1))


register(keras.losses.binary_crossentropy, LossKind(_family, lowest=_entropy, needs_targets=False))
