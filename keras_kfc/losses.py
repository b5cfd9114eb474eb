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
from keras.src.trainers.compile_utils import CompileLoss


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
    loss_weight: float | None = None


class _Reduction(keras.losses.Loss):
    """Keras's own reduction of given loss values, to read coefficients off."""

    def call(self, y_true, y_pred):
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
        entries._keras_mask = mask
    total = tf.reduce_sum(reduction(entries, entries, sample_weight=term.sample_weight))
    if term.loss_weight is not None:
        total *= tf.cast(term.loss_weight, total.dtype)
    return total


def element_coefficients(term: LossTerm, values: tf.Tensor, mask: tf.Tensor | None) -> tf.Tensor:
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
    coefficients *= tf.distribute.get_strategy().num_replicas_in_sync
    return tf.maximum(coefficients, 0)


class _Recorder:
    """Stands in for a loss and notes what Keras would have called it with."""

    def __init__(self, loss: Any, weight: Any, terms: list[LossTerm]):
        self._loss, self._weight, self._terms = loss, weight, terms

    def __call__(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> tf.Tensor:
        self._terms.append(LossTerm(self._loss, y_true, y_pred, sample_weight, self._weight))
        return tf.zeros(())


def loss_terms(
    compiled: CompileLoss, y_true: Any, y_pred: Any, sample_weight: Any = None
) -> list[LossTerm]:
    """Pairs the losses of a compiled model with outputs, targets and weights.

    Keras itself does the pairing, with recorders in place of the losses.

    Args:
        compiled: The model's `CompileLoss`.
        y_true: Targets in the structure that Keras takes, or None if unknown.
        y_pred: The model's outputs.
        sample_weight: Sample weights or None.

    Returns:
        A term for each output that has a loss.
    """
    targets = y_true
    if y_true is None:
        targets = y_pred
    if not compiled.built:
        compiled.build(targets, y_pred)
    terms: list[LossTerm] = []
    recording = object.__new__(type(compiled))
    recording.__dict__.update(compiled.__dict__)
    recording.__dict__.pop("call", None)  # the wrapper of keras_kfc.pending.watch_loss
    entries = [
        entry._replace(loss=_Recorder(entry.loss, entry.loss_weights, terms))
        for entry in compiled._flat_losses
    ]
    # No metrics: they would count the recorders' zeros.
    recording.__dict__.update(_flat_losses=entries, _metrics=[None] * len(entries))
    recording.call(targets, y_pred, sample_weight)
    if not keras.tree.is_nested(y_pred):
        # Of several losses on a single output Keras uses the first.
        terms = terms[:1]
    if y_true is None:
        for term in terms:
            term.y_true = None
    return terms


def compile_loss(loss: Any, model: Any = None) -> CompileLoss:
    """Keras's own handling of a `loss` argument, outside of `compile`.

    Args:
        loss: What `keras.Model.compile` takes as `loss`.
        model: The model, for the names of its outputs, or None.

    Returns:
        A `CompileLoss`.
    """
    return CompileLoss(loss, output_names=getattr(model, "output_names", None))
