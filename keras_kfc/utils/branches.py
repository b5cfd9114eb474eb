"""Branches of a graph that run now and then, for what they do and not for what they return."""

from collections.abc import Callable

import tensorflow as tf


def run_if(condition: tf.Tensor, branch: Callable[[], None]) -> None:
    """Runs a function if a condition holds.

    `tf.cond` marks its branches to be taken apart into the main graph, in which each of their
    operations waits for a switch. Of a deep network's statistics and inverses these are ten
    thousand, and TensorFlow's work on them takes longer than all tracing. Here the branch stays
    a function. All operations of a function run on one device, those of `tf.cond` on any, so that
    it is `tf.cond` where there are several: a GPU, or replicas.

    Args:
        condition: A boolean scalar.
        branch: The function. In a graph it is traced once.
    """
    if tf.executing_eagerly() or len(tf.config.list_logical_devices()) > 1:

        def taken() -> bool:
            branch()
            return True

        tf.cond(condition, taken, lambda: False)
        return
    traced = tf.function(branch, autograph=False).get_concrete_function()
    inputs = traced.captured_inputs
    signature = [tf.TensorSpec.from_tensor(tensor) for tensor in inputs]

    def nothing(*unused: tf.Tensor) -> None:
        del unused

    otherwise = tf.function(nothing, autograph=False).get_concrete_function(*signature)
    tf.raw_ops.If(cond=condition, input=inputs, Tout=[], then_branch=traced, else_branch=otherwise)
