"""Cross-entropies of classes: outputs are probabilities of which one is right, or their logits."""

import keras
import tensorflow as tf

from keras_kfc.losses.api import Family, LossKind, Options, register
from keras_kfc.losses.likelihood import Likelihood, uniform, x_log_x
from keras_kfc.losses.terms import LossTerm


class Categorical(Likelihood):
    """One class of D for each element."""

    averages = False

    def draw(self, seed: tf.Tensor) -> tf.Tensor:
        """The derivative at a class that is drawn with its probability."""
        probabilities = self._probabilities()
        total = tf.cumsum(probabilities, axis=-1)
        draw = uniform(tf.shape(probabilities)[:-1], seed, probabilities.dtype)
        draws = tf.reduce_sum(tf.cast(total <= draw[..., None] * total[..., -1:], tf.int32), -1)
        classes = tf.shape(probabilities)[-1]
        target = tf.one_hot(tf.minimum(draws, classes - 1), classes, dtype=probabilities.dtype)
        return self._derivative(probabilities, target)

    def times_root(self, z: tf.Tensor) -> tf.Tensor:
        """The derivatives at all classes, each times the root of its probability and `z`."""
        probabilities = self._probabilities()
        weights = tf.sqrt(probabilities) * z
        together = tf.reduce_sum(weights, axis=-1, keepdims=True)
        if self.from_logits:
            return probabilities * together - weights
        total = tf.reduce_sum(self.outputs, axis=-1, keepdims=True)
        return tf.math.divide_no_nan(together, total) - tf.math.divide_no_nan(weights, self.outputs)

    def _probabilities(self) -> tf.Tensor:
        if self.from_logits:
            return tf.nn.softmax(self.outputs)
        # Keras normalises what it is given.
        total = tf.reduce_sum(self.outputs, axis=-1, keepdims=True)
        return tf.math.divide_no_nan(self.outputs, total)

    def _derivative(self, probabilities: tf.Tensor, target: tf.Tensor) -> tf.Tensor:
        if self.from_logits:
            return probabilities - target
        total = tf.reduce_sum(self.outputs, axis=-1, keepdims=True)
        return tf.math.divide_no_nan(1.0, total) - tf.math.divide_no_nan(target, self.outputs)


def _family(term: LossTerm, options: Options) -> Family:
    from_logits = bool(options.get("from_logits", False))
    # Only that of integer labels has it.
    ignored = options.get("ignore_class")
    return Family(Categorical(term, options.get("axis", -1), from_logits, ignored))


def _entropy(targets: tf.Tensor, options: Options) -> tf.Tensor:
    """Of targets that may add up to anything, since predictions are normalised."""
    axis = options.get("axis", -1)
    smoothing = options.get("label_smoothing", 0.0)
    # Keras counts the last axis, whichever holds the classes.
    classes = tf.cast(tf.shape(targets)[-1], targets.dtype)
    targets = targets * (1 - smoothing) + smoothing / classes
    total = tf.reduce_sum(targets, axis)
    return x_log_x(total) - tf.reduce_sum(x_log_x(targets), axis)


register(
    keras.losses.categorical_crossentropy,
    LossKind(_family, lowest=_entropy, needs_targets=False),
)
register(keras.losses.sparse_categorical_crossentropy, LossKind(_family, needs_targets=False))
