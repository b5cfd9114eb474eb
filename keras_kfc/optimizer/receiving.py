"""What happens between the gradients and the step: the optimizer learns of the forward pass."""

import contextlib
from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_kfc._compat.tensorflow_internals import outside_of_the_trace
from keras_kfc.layers.groups import parameter_groups
from keras_kfc.optimizer.left_out import leave_out_what_has_no_statistics
from keras_kfc.passes.automatic import take_capture
from keras_kfc.passes.products import products_in


def receive_pass(optimizer: Any, gradients: Sequence[Any], variables: Sequence[Any] | None) -> None:
    """Takes in the forward pass that belongs to some gradients; builds the optimizer if need be.

    Args:
        optimizer: The `keras_kfc.KFC`.
        gradients: The gradients; None for a variable without.
        variables: Their variables, or None for all.
    """
    capture = take_capture(optimizer)
    # A step in which variables are made is traced once more.
    again = not optimizer.built
    if not optimizer.built and variables is not None:
        again = not _build(optimizer, capture, variables)
    if not optimizer.built:
        return
    leave_out_what_has_no_statistics(optimizer, capture, gradients, variables, again)
    # Leaving out may have made new parts.
    parts = optimizer.parts
    if capture is not None:
        parts.measuring.take_in_pending(capture)
        trained = optimizer.trained_variables if variables is None else variables
        by_kernel = products_in(capture, gradients, trained)
        parts.update.offer(
            {
                index: by_kernel[id(variable)]
                for index, variable in enumerate(optimizer.trained_variables)
                if id(variable) in by_kernel
            }
        )
        if again:
            parts.curvature.forget_captured()
    optimizer.notices.tell_coverage(
        parts.curvature,
        optimizer.trained_variables,
        optimizer.waiting.left_out,
        None if capture is None else capture.model,
    )


def _build(optimizer: Any, capture: Any, variables: Sequence[Any]) -> bool:
    """Builds the optimizer; returns whether the step that is being traced can be used."""
    usable = _has_seen_all(capture, variables)
    with contextlib.ExitStack() as stack:
        if usable:
            stack.enter_context(outside_of_the_trace())
        stack.enter_context(keras.name_scope(optimizer.name, caller=optimizer))
        optimizer.build(variables)
    return usable


def _has_seen_all(capture: Any, variables: Sequence[Any]) -> bool:
    """Whether a capture has all that a train step uses, which need not be traced again then.

    What parts of a model do is not recorded before their kernels have an optimizer.
    """
    if capture is None or capture.loss is None or tf.distribute.has_strategy():
        return False
    kernels = {id(group.matrix.kernel) for group in parameter_groups(variables)}
    return kernels <= set(capture.records)
