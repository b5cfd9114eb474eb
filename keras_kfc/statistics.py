"""From one captured forward pass to the Kronecker factors of its batch.

Joins what the modules below know separately: the loss terms of a compiled
model (`likelihood`), the backward passes (`capture`) and the factors
(`factors`).
"""

from typing import Any

import keras
import tensorflow as tf
from keras.src.trainers.compile_utils import CompileLoss

from keras_kfc.capture import Capture
from keras_kfc.factors import input_factor, output_factor
from keras_kfc.likelihood import LossTerm, OutputDerivatives


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
    recording.__dict__.pop("call", None)  # the wrapper of keras_kfc.capture.watch_loss
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


def batch_size_of(y_pred: Any) -> tf.Tensor:
    """Number of examples in a batch of outputs, a scalar."""
    return tf.shape(keras.tree.flatten(y_pred)[0])[0]


def batch_omegas(
    capture: Capture, batch_size: tf.Tensor, use_bias: dict[int, bool]
) -> dict[int, tf.Tensor]:
    """Input factors of one batch.

    Args:
        capture: The captured forward pass.
        batch_size: Number of examples.
        use_bias: For each record key that is wanted, whether the factor has a
            row for the bias.

    Returns:
        `{key: omega}`.
    """
    return {
        key: input_factor(record.geometry, record.inputs, batch_size, use_bias[key])
        for key, record in capture.records.items()
        if key in use_bias
    }


def batch_gammas(
    capture: Capture, outputs: OutputDerivatives, wanted: Any
) -> dict[int, tf.Tensor]:
    """Output factors of one batch, from one or more backward passes.

    Args:
        capture: The captured forward pass.
        outputs: What to start the backward passes from.
        wanted: The record keys that are wanted.

    Returns:
        `{key: gamma}`.
    """
    keys = [key for key in capture.records if key in wanted]

    def one_pass(index):
        derivatives = capture.differentiate(outputs.sources, outputs.derivatives(index))
        return [output_factor(capture.records[key].geometry, derivatives[key]) for key in keys]

    gammas = one_pass(0)
    if not isinstance(outputs.count, int):
        _, gammas = tf.while_loop(
            lambda index, _: index < outputs.count,
            lambda index, totals: (
                index + 1,
                [total + part for total, part in zip(totals, one_pass(index), strict=True)],
            ),
            (tf.constant(1), gammas),
            # Passes share the forward tensors: running them side by side only adds memory.
            parallel_iterations=1,
        )
    return dict(zip(keys, gammas, strict=True))


def ordinary_gammas(capture: Capture, scale: tf.Tensor, wanted: Any) -> dict[int, tf.Tensor]:
    """Output factors from the ordinary backward pass (empirical Fisher).

    Args:
        capture: A captured pass whose loss has been differentiated already.
        scale: What makes one example's derivative of the mean's: the batch
            size, over the loss scale where there is one.
        wanted: The record keys that are wanted.

    Returns:
        `{key: gamma}`, for layers that the backward pass reached.
    """
    return {
        key: tf.cast(scale, tf.float32) ** 2
        * output_factor(record.geometry, record.ordinary_derivatives)
        for key, record in capture.records.items()
        if key in wanted and record.ordinary_derivatives
    }
