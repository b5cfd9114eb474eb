"""Layers whose statistics cannot be had: the fallback rule trains them.

They are known once the gradients are applied. That is, where the train step is a graph,
while it is traced, so that the optimizer gives up their blocks before its first step.
Two kinds of layers are left out:

* those whose derivatives are differentiated again, by a differential equation in the loss
  or a gradient penalty. Their gradient is no sum over the uses of a forward pass of an
  input times a derivative, so that factors made of these are not those of the loss;
* those with a gradient that no recorded use of the layer explains.
"""

import logging
from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from keras_kfc.optimizer.resuming import leave_out
from keras_kfc.passes.capture import Capture
from keras_kfc.placement.current import current_placement

_logger = logging.getLogger("keras_kfc")


def leave_out_what_has_no_statistics(
    optimizer: Any,
    capture: Capture | None,
    gradients: Sequence[Any],
    variables: Sequence[Any] | None,
    built_now: bool,
) -> None:
    """Gives layers without statistics over to the fallback rule, and says so once.

    Where that comes too late, because steps have been traced or taken with their blocks,
    they keep these, and step along the gradient if nothing was ever recorded.

    Args:
        optimizer: The optimizer, built.
        capture: What it has captured since its last step, or None.
        gradients: The gradients that are applied; None for a variable without.
        variables: Their variables, or None for all.
        built_now: Whether this step has built it, so that parts of a model could not know it
            in the forward pass; the next step will record them.
    """
    if not optimizer.blocks:
        return
    if not tf.executing_eagerly() and not _is_initialized(optimizer.blocks[0]):
        # Built in this trace. TensorFlow traces the step once more before it runs.
        return
    records = {} if capture is None else capture.records
    kernels = {
        id(optimizer.trained_variables[block.kernel_index]): block for block in optimizer.blocks
    }
    again = {
        kernels[key].kernel_index
        for key, record in records.items()
        if key in kernels and any(use.differentiated_again for use in record.uses)
    }
    _leave_out(
        optimizer,
        again,
        "Their derivatives are differentiated again, as in a differential equation or a gradient "
        "penalty, so that their Kronecker factors would not be those of the loss.",
    )
    if built_now:
        return
    recorded = {
        key
        for key, record in records.items()
        if capture is not None and (capture.loss is not None or record.differentiated_uses())
    }
    if variables is None:
        variables = optimizer.trained_variables
    present = {id(v) for v, g in zip(variables, gradients, strict=False) if g is not None}
    unseen = {
        block.kernel_index
        for key, block in kernels.items()
        if key in present
        and key not in recorded
        and block.kernel_index not in again | optimizer.parts.curvature.captured
    }
    _leave_out(
        optimizer,
        unseen,
        "They have gradients, but no inputs and derivatives of them were recorded. To change "
        "that, train with `fit`, call the model in the train step, inside its gradient tape, or "
        "use `keras_kfc.Capture` and `optimizer.update_factors`.",
    )


def _leave_out(optimizer: Any, kernels: set[int], reason: str) -> None:
    new = kernels - optimizer.notices.told_of
    blocks = [block for block in optimizer.blocks if block.kernel_index in new]
    if not blocks:
        return
    paths = ", ".join(block.path for block in blocks)
    if _can_leave_out(optimizer, blocks):
        leave_out(optimizer, kernels)
        _logger.warning("The fallback rule of KFC, an Adam, trains %s. %s", paths, reason)
    else:
        optimizer.notices.told_of |= kernels
        _logger.warning(
            "KFC should not train %s, but has begun to: go on with a new optimizer, after "
            "`keras_kfc.instrument(model, exclude=[...])`. %s",
            paths,
            reason,
        )


def _is_initialized(block: Any) -> bool:
    """Whether a block's variables hold anything: those made in a trace do after it."""
    with tf.init_scope():
        return all(bool(copy.is_initialized()) for copy in _copies(block.ema_weight))


def _copies(variable: Any) -> Sequence[tf.Variable]:
    strategy = tf.distribute.get_strategy()
    return strategy.experimental_local_results(variable.value)


def _can_leave_out(optimizer: Any, blocks: Sequence[Any]) -> bool:
    """Whether nobody uses the optimizer's variables or the blocks' factors yet."""
    if current_placement().count > 1:
        return False
    with tf.init_scope():
        used = any(block.ema_weight.numpy() for block in blocks)
        started = int(optimizer.iterations.numpy()) > 0
    # Functions that were traced before would go on with the old variables.
    traced = not tf.executing_eagerly() and (started or optimizer.parts.curvature.captured)
    return not used and not traced
