"""What the package needs of Keras that has no public name. Read in Keras 3.15."""

from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf
from keras.src.backend.common.global_state import get_global_attribute
from keras.src.losses.loss import squeeze_or_expand_to_same_rank
from keras.src.losses.losses import LossFunctionWrapper
from keras.src.trainers.compile_utils import CompileLoss


def call_context() -> Any:
    """What Keras knows of the model call that runs now, or None.

    It has `entry_layer`, the model that was called, and `training`. Unlike a layer's own way of
    asking, this leaves no context behind where there is none.
    """
    return get_global_attribute("current_call_ctx")


def mask_of(tensor: Any) -> tf.Tensor | None:
    """Keras's mask of a tensor, or None."""
    return getattr(tensor, "_keras_mask", None)


def set_mask(tensor: Any, mask: Any) -> None:
    """Gives a tensor Keras's mask."""
    tensor._keras_mask = mask


def logits_of(tensor: Any) -> tf.Tensor | None:
    """The logits that Keras notes on the outputs of a softmax or sigmoid, or None."""
    return getattr(tensor, "_keras_logits", None)


def set_logits(tensor: Any, logits: Any) -> None:
    """Notes logits on outputs, as the activations of Keras do."""
    tensor._keras_logits = logits


def of_the_same_rank(first: Any, second: Any) -> tuple[Any, Any]:
    """Targets and outputs as Keras's losses compare them."""
    return squeeze_or_expand_to_same_rank(first, second)


def wrapped_function(loss: Any) -> Callable[..., Any] | None:
    """The function that a loss computes, or None if a `call` of its own may compute anything."""
    known = getattr(type(loss), "call", None) is LossFunctionWrapper.call
    return loss.fn if known else None


def wrapped_options(loss: Any) -> dict[str, Any]:
    """The keyword arguments that a loss calls its function with."""
    return dict(getattr(loss, "_fn_kwargs", {}))


def compile_loss(loss: Any, model: Any = None) -> Any:
    """Keras's own handling of a `loss` argument, outside of `compile`.

    Args:
        loss: What `keras.Model.compile` takes as `loss`.
        model: The model, for the names of its outputs, or None.

    Returns:
        A `CompileLoss`.
    """
    return CompileLoss(loss, output_names=getattr(model, "output_names", None))


def compiled_loss_of(model: Any) -> Any:
    """The `CompileLoss` of a compiled model, or None."""
    return getattr(model, "_compile_loss", None)


def call_with_other_losses(
    compiled: Any,
    other: Callable[[Any, Any], Any],
    y_true: Any,
    y_pred: Any,
    sample_weight: Any,
) -> None:
    """Lets a `CompileLoss` pair outputs, targets and weights with other losses than its own.

    Args:
        compiled: The `CompileLoss`, which stays as it is.
        other: Function from a loss and its loss weight to what is called in its place.
        y_true: Targets.
        y_pred: Outputs.
        sample_weight: Sample weights or None.
    """
    if not compiled.built:
        compiled.build(y_true, y_pred)
    copy = object.__new__(type(compiled))
    copy.__dict__.update(compiled.__dict__)
    # A wrapper that the package has put on the original.
    copy.__dict__.pop("call", None)
    entries = [
        entry._replace(loss=other(entry.loss, entry.loss_weights))
        for entry in compiled._flat_losses
    ]
    # No metrics: they would count what is called in the losses' place.
    copy.__dict__.update(_flat_losses=entries, _metrics=[None] * len(entries))
    copy.call(y_true, y_pred, sample_weight)


def layers_within(layer: Any, include_self: bool = True) -> Sequence[keras.Layer]:
    """All layers inside a layer, at any depth."""
    return layer._flatten_layers(include_self=include_self)


def own_trainable_variables(layer: Any) -> Sequence[keras.Variable]:
    """Trainable variables of a layer itself, not of the layers inside it."""
    return list(layer._trainable_variables)


def takes_training(layer: Any) -> bool:
    """Whether a layer's `call` has an argument `training`."""
    return layer._call_has_training_arg


def takes_mask(layer: Any) -> bool:
    """Whether a layer's `call` has an argument `mask`."""
    return layer._call_has_mask_arg


def learning_rate_schedule(optimizer: Any) -> Any:
    """The schedule of an optimizer's learning rate, or None if it has none."""
    held = optimizer._learning_rate
    return held if isinstance(held, keras.optimizers.schedules.LearningRateSchedule) else None
