"""The captures that compiled models open by themselves.

A model whose optimizer has Kronecker factors opens one at the first
instrumented layer of a training pass and closes it when it computes its
compiled loss, which notes what it was called with. The capture is then pending
until the optimizer takes it, when it applies the gradients. Each replica of a
`tf.distribute` strategy has its own; replicas are traced as interleaved threads,
not always the same ones in the forward pass and for the optimizer.
"""

import dataclasses
import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from keras_kfc._compat.keras_internals import call_context, compiled_loss_of
from keras_kfc.passes.again import unwatch_data, watch_data
from keras_kfc.passes.capture import (
    Capture,
    close_captures_of_models,
    innermost_capture,
    is_differentiated,
)
from keras_kfc.passes.loops import recorder_of_loop
from keras_kfc.passes.records import LossEvaluation
from keras_kfc.placement.current import replica_number

_logger = logging.getLogger("keras_kfc")

# Forward passes of one eager train step.
_EAGER_PASSES = 16


def active_capture(kernel: Any) -> Any:
    """The capture that a layer call belongs to, or None if nobody asked.

    Inside a loop over time, what stands for it there (`keras_kfc.passes.loops`).

    Args:
        kernel: A kernel variable of the instrumented layer that is being called.
    """
    in_loop = recorder_of_loop()
    if in_loop is not None:
        return in_loop
    explicit = innermost_capture()
    if explicit is not None:
        return explicit
    context = call_context()
    model = getattr(context, "entry_layer", None)
    optimizer = getattr(model, "optimizer", None)
    part = model is not None and optimizer is None
    if part:
        # Part of a model, called by the train step of the whole.
        owner = getattr(kernel, "kronecker_optimizer_ref", None)
        optimizer = None if owner is None else owner()
    optimizer = kronecker_optimizer(optimizer)
    if optimizer is None or not kernel.trainable or not optimizer.has_block(kernel):
        return None
    pending = _pending_of(optimizer)
    finished = None
    if pending is not None and pending.capture.was_opened_here():
        if pending.capture.is_open and pending.context is context:
            return pending.capture
        finished = pending.capture.loss
    if not is_differentiated():
        return None
    if pending is not None:
        if pending.takes(kernel, part):
            pending.context = context
            pending.passes += 1
            return pending.capture
        # Not where no loss has been computed: a Dropout that nobody told that it trains
        # leaves word in the context, for the layers behind it, that they do not.
        if finished is not None and getattr(context, "training", None) is False:
            return None
        pending.capture.close()
    watch_loss(model)
    # Of the model that trains, since a part of it knows none of the data.
    needed: Sequence[Any] = ()
    if model is not None and optimizer.step == "quadratic":
        needed = model.trainable_variables
    if needed:
        watch_data(model, functools.partial(_note_loss_again, model))
    capture = Capture(needed)
    capture.model = model
    capture.open()
    if finished is not None:
        _logger.warning(
            "%s computed its loss more than once before the optimizer's step: the Kronecker "
            "factors come from the last time. To choose, use `keras_kfc.Capture` and "
            "`update_factors` in the train step.",
            type(model).__name__,
        )
    optimizer.automatic_captures.by_replica[replica_number()] = _Pending(context, capture)
    return capture


def open_for_weights(kernel: Any) -> None:
    """Opens the capture before a layer is called, if its optimizer asks for Jacobians.

    Statistics need what follows a layer's products alone, derivatives with regard to its weights
    the products, too.

    Args:
        kernel: A kernel variable of the layer.
    """
    if innermost_capture() is not None or recorder_of_loop() is not None:
        return
    model = getattr(call_context(), "entry_layer", None)
    optimizer = kronecker_optimizer(getattr(model, "optimizer", None))
    if optimizer is not None and optimizer.step == "quadratic":
        active_capture(kernel)


def take_capture(optimizer: Any) -> Capture | None:
    """Hands the capture of the last training pass to its optimizer, once.

    Args:
        optimizer: The optimizer with Kronecker factors.
    """
    # The train step has got to the gradients: forward passes are over, those of models that
    # other optimizers train, too. Backward passes through them may still follow.
    close_captures_of_models()
    pending = optimizer.automatic_captures.by_replica.pop(replica_number(), None)
    if pending is None:
        return None
    pending.capture.close()
    return pending.capture


def kronecker_optimizer(optimizer: Any) -> Any:
    """The optimizer with Kronecker factors, unwrapped from loss scaling, or None."""
    while optimizer is not None and not hasattr(optimizer, "update_factors"):
        optimizer = getattr(optimizer, "inner_optimizer", None)
    return optimizer


def watch_loss(model: Any) -> None:
    """Makes a model's compiled loss tell the open capture what it was called with.

    The wrapper stands on the instance of `CompileLoss`, which belongs to one
    `compile` and is never saved: the model and its class stay as they are, and
    every train step that uses the compiled loss is served.

    Args:
        model: A compiled `keras.Model`.
    """
    compiled = compiled_loss_of(model)
    if compiled is None or "call" in vars(compiled):
        return
    original = compiled.call

    def call(y_true: Any, y_pred: Any, sample_weight: Any = None) -> tf.Tensor:
        value = original(y_true, y_pred, sample_weight)
        optimizer = kronecker_optimizer(model.optimizer)
        pending = (
            None
            if optimizer is None
            else optimizer.automatic_captures.by_replica.get(replica_number())
        )
        if pending is not None and pending.capture.is_open:
            pending.capture.close()
            pending.capture.loss = LossEvaluation(compiled, y_true, y_pred, sample_weight, value)
        return value

    compiled.call = call


def unwatch_loss(model: Any) -> None:
    """Undoes `watch_loss`, and what goes with it."""
    unwatch_data(model)
    compiled = compiled_loss_of(model)
    if compiled is not None:
        vars(compiled).pop("call", None)


def _note_loss_again(model: Any, loss_again: Callable[[], tf.Tensor]) -> None:
    optimizer = kronecker_optimizer(model.optimizer)
    pending = None if optimizer is None else _pending_of(optimizer)
    if pending is not None and pending.capture.is_open:
        pending.capture.loss_again = loss_again


class AutomaticCaptures:
    """The captures of one optimizer that it has not taken yet, by number of the replica.

    An object of its own, because TensorFlow would track a dictionary.
    """

    def __init__(self) -> None:
        self.by_replica: dict[int, _Pending] = {}


@dataclasses.dataclass
class _Pending:
    context: Any
    capture: Capture
    passes: int = 1

    def takes(self, kernel: Any, part: bool) -> bool:
        """Whether another forward pass belongs with those that were captured.

        Passes before one loss or step do. In eager mode the older ones may be passes that nobody
        finished; what is not differentiated does not count, but takes memory.

        Args:
            kernel: The kernel of the layer that is being called.
            part: Whether the pass is through a part of the model.
        """
        if not (self.capture.is_open and self.capture.was_opened_here()):
            return False
        new_part = part and id(kernel) not in self.capture.records
        if new_part or not tf.executing_eagerly():
            return True
        return self.passes < _EAGER_PASSES and not self.capture.has_derivatives()


def _pending_of(optimizer: Any) -> _Pending | None:
    return optimizer.automatic_captures.by_replica.get(replica_number())
