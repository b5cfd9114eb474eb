"""Output derivatives at the training targets: the empirical Fisher matrix.

For every loss that Keras takes, those included of which nothing else is known.
"""

import tensorflow as tf

from keras_kfc._compat.keras_internals import logits_of, mask_of, set_logits, set_mask
from keras_kfc.linalg.precision import at_least_float32
from keras_kfc.losses.signs import random_signs
from keras_kfc.losses.terms import LossTerm, loss_values, loss_weights_per_element
from keras_kfc.placement.current import current_placement


class EmpiricalDerivatives:
    """Output derivatives of the loss at the training targets (empirical Fisher).

    Works for every `keras.losses.Loss`. One example's derivative is scaled by
    `1 / sqrt(w)`, w being its weight in the mean, so that weights enter as
    they do in the Fisher matrix. Where the loss has no value for each example, its
    derivative in one example's outputs takes that place.

    As part of another Fisher matrix (`sample`, `column`) each example has a random sign,
    so that what examples and loss terms have in common cancels, as it does between
    independent draws.

    Args:
        term: The loss term; `y_true` is needed.

    Attributes:
        sources: Tensors to start the backward pass from.
    """

    def __init__(self, term: LossTerm):
        outputs = term.y_pred
        logits = logits_of(outputs)
        self.sources = [outputs] if logits is None else [outputs, logits]
        self._derivatives = self._differentiate(term)

    def derivatives(self) -> list[tf.Tensor]:
        """Derivatives for each of `sources`, of their shapes and dtypes."""
        return self._derivatives

    def sample(self, seed: tf.Tensor) -> list[tf.Tensor]:
        """The derivatives, with a random sign for each example.

        Args:
            seed: Two integers.
        """
        return with_random_signs(self._derivatives, seed)

    def root_shape(self) -> tf.Tensor:
        """Shape of what R is multiplied with: a number for each example, `(B,)`."""
        return tf.shape(self._derivatives[0])[:1]

    def root_times(self, z: tf.Tensor) -> list[tf.Tensor]:
        """The derivatives, each example's times its number."""
        return [scale_examples(tensor, z) for tensor in self._derivatives]

    def count_columns(self) -> tf.Tensor:
        """Number of backward passes, 1."""
        return tf.constant(1)

    def column(self, index: tf.Tensor) -> list[tf.Tensor]:
        """The derivatives for `index` 0, zeros for any other."""
        return [
            tf.where(tf.equal(index, 0), tensor, tf.zeros_like(tensor))
            for tensor in self._derivatives
        ]

    def _differentiate(self, term: LossTerm) -> list[tf.Tensor]:
        outputs = tf.identity(self.sources[0])
        watched = [outputs]
        if len(self.sources) == 2:
            watched.append(tf.identity(self.sources[1]))
            set_logits(outputs, watched[1])
        mask = mask_of(term.y_pred)
        if mask is not None:
            set_mask(outputs, mask)
        with tf.GradientTape() as tape:
            tape.watch(watched)
            loss = tf.reduce_sum(term.loss(term.y_true, outputs, term.sample_weight))
        gradients = tape.gradient(loss, watched, unconnected_gradients=tf.UnconnectedGradients.ZERO)
        values, mask = loss_values(term, outputs)
        weights = loss_weights_per_element(term, tf.zeros_like(values), mask)
        examples = tf.cast(tf.shape(outputs)[0], weights.dtype)
        if has_value_for_each_example(values, outputs):
            weights = tf.reshape(weights, (tf.shape(weights)[0], -1))
            weights = examples * tf.reduce_sum(weights, axis=1)
        else:
            weights = tf.reduce_sum(weights)
        # Keras divides each replica's loss by their number.
        loss_weight = 1.0 if term.loss_weight is None else term.loss_weight
        loss_weight *= current_placement().count
        scale = examples * tf.math.divide_no_nan(
            tf.cast(loss_weight, weights.dtype), tf.sqrt(weights)
        )
        return [scale_examples(gradient, scale) for gradient in gradients]


def has_value_for_each_example(values: tf.Tensor, outputs: tf.Tensor) -> bool:
    """Whether the first axis of loss values can be that of the outputs, the examples."""
    rank = values.shape.rank
    return bool(rank) and values.shape[0] == outputs.shape[0]


def with_random_signs(tensors: list[tf.Tensor], seed: tf.Tensor) -> list[tf.Tensor]:
    """Gives each example of a batch a random sign, the same in all tensors.

    Args:
        tensors: Tensors of derivatives with examples along the first axis.
        seed: Two integers.
    """
    signs = random_signs((tf.shape(tensors[0])[0],), seed, tf.float32)
    return [scale_examples(tensor, signs) for tensor in tensors]


def scale_examples(tensor: tf.Tensor, scale: tf.Tensor) -> tf.Tensor:
    """Multiplies each example of a tensor by its own factor.

    Args:
        tensor: `(examples, ...)`.
        scale: `(examples,)`, or a scalar.
    """
    wide = at_least_float32(tensor)
    if scale.shape.rank:
        scale = tf.reshape(scale, tf.concat(([-1], tf.ones(tf.rank(tensor) - 1, tf.int32)), 0))
    return tf.cast(wide * tf.cast(scale, wide.dtype), tensor.dtype)
