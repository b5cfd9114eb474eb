"""What the second backward passes of one forward pass start from.

One pass for the sampled and the empirical Fisher matrix, one for each column
of the Hessian's root for the exact one.
"""

import dataclasses
from collections.abc import Callable, Sequence

import tensorflow as tf

from keras_kfc.likelihood import distribution_of
from keras_kfc.losses import LossTerm, element_coefficients
from keras_kfc.patches import at_least_float32
from keras_kfc.replicas import count_replicas

FISHERS = ("sampled", "empirical", "exact")


class EmpiricalDerivatives:
    """Output derivatives of the loss at the training targets (empirical Fisher).

    Works for every `keras.losses.Loss`. One example's derivative is scaled by
    `1 / sqrt(w)`, w being its weight in the mean, so that weights enter as
    they do in the Fisher matrix.

    Args:
        term: The loss term; `y_true` is needed.

    Attributes:
        sources: Tensors to start the backward pass from.
    """

    def __init__(self, term: LossTerm):
        outputs = term.y_pred
        logits = getattr(outputs, "_keras_logits", None)
        self.sources = [outputs] if logits is None else [outputs, logits]
        self._term = term

    def derivatives(self) -> list[tf.Tensor]:
        """Derivatives for each of `sources`, of their shapes and dtypes."""
        term = self._term
        outputs = tf.identity(self.sources[0])
        watched = [outputs]
        if len(self.sources) == 2:
            watched.append(tf.identity(self.sources[1]))
            outputs._keras_logits = watched[1]
        mask = getattr(term.y_pred, "_keras_mask", None)
        if mask is not None:
            outputs._keras_mask = mask
        with tf.GradientTape() as tape:
            tape.watch(watched)
            loss = tf.reduce_sum(term.loss(term.y_true, outputs, term.sample_weight))
        gradients = tape.gradient(loss, watched, unconnected_gradients=tf.UnconnectedGradients.ZERO)
        values = term.loss.call(
            tf.cast(term.y_true, term.loss.dtype), tf.cast(outputs, term.loss.dtype)
        )
        # Masks that the loss itself attaches (ignore_class) show in its values.
        inner_mask = getattr(values, "_keras_mask", None)
        if inner_mask is not None:
            mask = inner_mask if mask is None else mask & inner_mask
        weights = element_coefficients(term, tf.zeros_like(values), mask)
        examples = tf.cast(tf.shape(outputs)[0], weights.dtype)
        if weights.shape.rank:
            weights = tf.reshape(weights, (tf.shape(weights)[0], -1))
            weights = examples * tf.reduce_sum(weights, axis=1)
        # Keras divides each replica's loss by their number.
        loss_weight = count_replicas() * (1.0 if term.loss_weight is None else term.loss_weight)
        scale = examples * tf.math.divide_no_nan(
            tf.cast(loss_weight, weights.dtype), tf.sqrt(weights)
        )
        return [_scale_examples(gradient, scale) for gradient in gradients]


@dataclasses.dataclass
class OutputDerivatives:
    """What to start the second backward passes of one forward pass from.

    Args:
        sources: Output tensors.
        count: Number of backward passes, a Python integer or a scalar tensor.
        derivatives: Function from the number of the pass to a tensor for each source.
    """

    sources: list[tf.Tensor]
    count: int | tf.Tensor
    derivatives: Callable[[tf.Tensor], list[tf.Tensor]]


def output_derivatives(
    terms: Sequence[LossTerm], fisher: str, seed: tf.Tensor
) -> OutputDerivatives:
    """Output derivatives of all loss terms of a model for one kind of Fisher matrix.

    Args:
        terms: The model's loss terms; draws for different terms are independent.
        fisher: `"sampled"`, `"empirical"` or `"exact"`.
        seed: Two integers, for `"sampled"`.

    Returns:
        An `OutputDerivatives`; Gamma is the sum over its backward passes.

    Raises:
        ValueError: If a loss has no known distribution and `fisher` needs one.
    """
    if fisher == "empirical":
        empirical = [EmpiricalDerivatives(term) for term in terms]
        return OutputDerivatives(
            [source for part in empirical for source in part.sources],
            1,
            lambda _: [tensor for part in empirical for tensor in part.derivatives()],
        )
    parts = [distribution_of(term) for term in terms]
    sources = [source for part in parts for source in part.sources]
    if fisher == "sampled":
        return OutputDerivatives(
            sources,
            1,
            lambda _: [
                tensor
                for number, part in enumerate(parts)
                # The second entry counts steps: draws of one step must not return in the next.
                for tensor in part.sample(seed + tf.constant([number << 32, 0], seed.dtype))
            ],
        )
    counts = [part.count_columns() for part in parts]

    def columns(index):
        tensors, first = [], 0
        for part, count in zip(parts, counts, strict=True):
            # Outside of the part's own range the one-hot choice is all zeros.
            tensors += part.column(tf.cast(index, tf.int32) - first)
            first += count
        return tensors

    return OutputDerivatives(sources, tf.add_n(counts), columns)


def _scale_examples(tensor: tf.Tensor, scale: tf.Tensor) -> tf.Tensor:
    if scale.shape.rank:
        scale = tf.reshape(scale, tf.concat(([-1], tf.ones(tf.rank(tensor) - 1, tf.int32)), 0))
    return tf.cast(
        at_least_float32(tensor) * tf.cast(scale, at_least_float32(tensor).dtype), tensor.dtype
    )
