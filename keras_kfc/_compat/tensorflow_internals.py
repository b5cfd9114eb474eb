"""What the package needs of TensorFlow that has no public name. Read in TensorFlow 2.21."""

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import tensorflow as tf
from tensorflow.python.eager import imperative_grad, record
from tensorflow.python.ops import control_flow_util
from tensorflow.python.ops.resource_variable_ops import default_variable_creator_v2


def is_recording() -> bool:
    """Whether a gradient tape records what happens now."""
    return record.could_possibly_record()


def current_graph() -> Any:
    """The graph that is being built now, or None in eager mode."""
    return None if tf.executing_eagerly() else tf.compat.v1.get_default_graph()


def outer_graph(graph: Any) -> Any:
    """The graph that a function's graph is built inside of, or None."""
    return getattr(graph, "outer_graph", None)


def compiled_by_xla() -> bool:
    """Whether the graph that is being built is one for XLA to compile."""
    graph = current_graph()
    return graph is not None and control_flow_util.GraphOrParentsInXlaContext(graph)


def products_are_exact() -> bool:
    """Whether matrix products have the precision of their dtype, unlike TF32 ones of a GPU."""
    rounded = tf.config.experimental.tensor_float_32_execution_enabled()
    return not (rounded and tf.config.list_logical_devices("GPU"))


def differentiates_for(variable: Any) -> bool:
    """Whether the backward pass that runs now is for a variable, or may be.

    Args:
        variable: A Keras variable.
    """
    frame: Any = sys._getframe()
    while frame is not None and frame.f_code is not imperative_grad.imperative_grad.__code__:
        frame = frame.f_back
    handle = getattr(variable.value, "handle", None)
    if frame is None or handle is None:
        return True
    return any(source is handle for source in frame.f_locals["sources"])


@contextlib.contextmanager
def outside_of_the_trace() -> Iterator[None]:
    """Makes variables eagerly while a function is traced.

    A function in whose first trace variables are made is traced twice, and one that is being
    traced again refuses variables that it does not know of.
    """
    with tf.init_scope(), tf.variable_creator_scope(_plain_variable):
        yield


def _plain_variable(next_creator: Any, **arguments: Any) -> tf.Variable:
    return default_variable_creator_v2(**arguments)
