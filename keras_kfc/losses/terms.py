"""The losses of a compiled model, taken apart.

A Keras loss is a sum over *elements* (an example, or one position of an
example), `L = Σ_e c_e ℓ_e`, where `ℓ_e` is what the loss function returns and
the coefficients `c_e` come from the reduction, sample weights, class weights,
masks and loss weights. Both the pairing of losses with outputs and the coefficients
are read off Keras's own code, not computed again.
"""

import dataclasses
from typing import Any

import keras
import tensorflow as tf

from keras_kfc._compat.keras_internals import (
    call_with_other_losses,
    logits_of,
    mask_of,
    set_logits,
    set_mask,
    wrapped_function,
    wrapped_options,
)
from keras_kfc.placement.current import current_placement


@dataclasses.dataclass
class LossTerm:
    """One loss of a compiled model, with the output it applies to.

    Args:
        loss: The `keras.losses.Loss`.
        y_true: Targets, or None where they are not known.
        y_pred: The model's output.
        sample_weight: Sample weights as Keras passes them on, or None.
        loss_weight: Loss weight, or None.
    """

    loss: keras.losses.Loss
    y_true: tf.Tensor | None
    y_pred: tf.Tensor
    sample_weight: tf.Tensor | None = None
    loss_weight: float | tf.Tensor | None = None

    @property
    def name(self) -> str:
        """What messages call the loss."""
        return getattr(self.loss, "name", None) or type(self.loss).__name__


def known_function(loss: Any) -> tuple[Any, dict[str, Any]]:
    """The function that a Keras loss computes, and its options.

    Args:
        loss: The `keras.losses.Loss`.

    Returns:
        The function, or None where a `call` of the loss's own may compute anything, and
        the keyword arguments that the loss calls it with.
    """
    return wrapped_function(loss), wrapped_options(loss)


def loss_values(
    term: LossTerm, outputs: tf.Tensor, dtype: tf.DType | None = None
) -> tuple[tf.Tensor, tf.Tensor | None]:
    """What the loss function returns, before weights and reduction.

    Args:
        term: The loss term; `y_true` is needed.
        outputs: What to call the loss function with in place of the term's outputs.
        dtype: Type to compute in, by default the loss's own.

    Returns:
        The values `ℓ_e`, and a mask of those that count or None: the outputs' own joined
        with one that the loss function attaches (`ignore_class`).
    """
    dtype = term.loss.dtype if dtype is None else dtype
    mask, logits = mask_of(term.y_pred), logits_of(outputs)
    outputs = tf.identity(tf.cast(outputs, dtype))  # attributes go on a tensor of our own
    if logits is not None:
        set_logits(outputs, logits)
    if mask is not None:
        set_mask(outputs, mask)
    values = tf.convert_to_tensor(term.loss.call(tf.cast(term.y_true, dtype), outputs))
    inner_mask = mask_of(values)
    if inner_mask is not None:
        mask = inner_mask if mask is None else mask & inner_mask
    return values, mask


class _Reduction(keras.losses.Loss):
    """Keras's own reduction of given loss values, to read coefficients off."""

    def call(self, y_true: tf.Tensor, y_pred: tf.Tensor) -> tf.Tensor:
        del y_true
        return y_pred


def reduced_loss(term: LossTerm, values: tf.Tensor, mask: tf.Tensor | None) -> tf.Tensor:
    """What a loss term adds to the total loss, by Keras's own reduction.

    Args:
        term: The loss term.
        values: Loss values, one for each element.
        mask: Mask of the elements, or None.

    Returns:
        A scalar.
    """
    reduction = _Reduction("reduction", term.loss.reduction, values.dtype.name)
    entries = tf.identity(values)
    if mask is not None:
        set_mask(entries, mask)
    total = tf.reduce_sum(reduction(entries, entries, sample_weight=term.sample_weight))
    if term.loss_weight is not None:
        total *= tf.cast(term.loss_weight, total.dtype)
    return total


def loss_weights_per_element(
    term: LossTerm, values: tf.Tensor, mask: tf.Tensor | None
) -> tf.Tensor:
    """Coefficients `c_e` of the loss values in the total loss.

    They are the derivative of Keras's own reduction with respect to the values.

    Args:
        term: The loss term.
        values: A tensor of the shape of the loss values, one for each element.
        mask: Mask of the elements, or None.

    Returns:
        A tensor of the shape of `values`; negative weights count as zero.
    """
    with tf.GradientTape() as tape:
        tape.watch(values)
        total = reduced_loss(term, values, mask)
    coefficients = tape.gradient(total, values)
    # Keras divides the loss by the number of replicas, which average again.
    coefficients *= current_placement().count
    return tf.maximum(coefficients, 0)


def root_coefficients(
    term: LossTerm, values: tf.Tensor, mask: tf.Tensor | None, examples: tf.Tensor
) -> tf.Tensor:
    """`sqrt(B c_e)`, which scales an element's derivatives in the Fisher matrix.

    Args:
        term: The loss term.
        values: A tensor of the shape of the loss values, one for each element.
        mask: Mask of the elements, or None.
        examples: Number of examples in the batch, B.

    Returns:
        A tensor of the shape of `values`.
    """
    coefficients = loss_weights_per_element(term, tf.zeros_like(values), mask)
    return tf.sqrt(tf.cast(examples, coefficients.dtype) * coefficients)


class _Recorder:
    """Stands in for a loss and notes what Keras would have called it with."""

    def __init__(self, loss: Any, weight: Any, terms: list[LossTerm]):
        self._loss, self._weight, self._terms = loss, weight, terms

    def __call__(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> tf.Tensor:
        self._terms.append(LossTerm(self._loss, y_true, y_pred, sample_weight, self._weight))
        return tf.zeros(())


def loss_terms(
    compiled: Any,
    y_true: Any,
    y_pred: Any,
    sample_weight: Any = None,
    loss_value: tf.Tensor | None = None,
) -> list[LossTerm]:
    """Pairs the losses of a compiled model with outputs, targets and weights.

    Keras itself does the pairing, with recorders in place of the losses.

    Args:
        compiled: The model's `CompileLoss`.
        y_true: Targets in the structure that Keras takes, or None if unknown.
        y_pred: The model's outputs.
        sample_weight: Sample weights or None.
        loss_value: What the compiled loss returned, if known. It is no scalar where a loss
            has `reduction="none"`; training then takes the gradient of its sum.

    Returns:
        A term for each output that has a loss.
    """
    targets = y_true
    if y_true is None:
        targets = y_pred
    terms: list[LossTerm] = []
    call_with_other_losses(
        compiled,
        lambda loss, weight: _Recorder(loss, weight, terms),
        targets,
        y_pred,
        sample_weight,
    )
    if not keras.tree.is_nested(y_pred):
        # Of several losses on a single output Keras uses the first.
        terms = terms[:1]
    if y_true is None:
        for term in terms:
            term.y_true = None
    if loss_value is not None and loss_value.shape.rank != 0:
        for term in terms:
            if term.loss.reduction not in (None, "none"):
                # A scalar was added to each entry of the other outputs' values.
                times = tf.cast(tf.size(loss_value), tf.float32)
                term.loss_weight = times * (1.0 if term.loss_weight is None else term.loss_weight)
    return terms
