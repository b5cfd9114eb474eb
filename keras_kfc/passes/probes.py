"""What backward passes tell of a pre-activation on their way through it.

A probe is an identity whose gradient function notes the derivative that comes by. It
asks which variables the backward pass is for, since one that is not for a layer's kernel
says nothing of the layer's Fisher block: `tape.gradient` runs through all that the tape
has recorded, whatever is differentiated.
"""

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import tensorflow as tf

from keras_kfc._compat.tensorflow_internals import differentiates_for, is_recording


class _Noticing(threading.local):
    def __init__(self) -> None:
        self.paused = False


_noticing = _Noticing()


@contextlib.contextmanager
def unnoticed() -> Iterator[None]:
    """Backward passes inside of it are not the training's, and tell of nothing."""
    before, _noticing.paused = _noticing.paused, True
    try:
        yield
    finally:
        _noticing.paused = before


def with_probe(use: Any) -> tf.Tensor:
    """A use's pre-activation behind a probe.

    Args:
        use: The `keras_kfc.passes.records.Use`; its `derivative` and `differentiated_again` will be
            set.
    """
    # TensorFlow keeps these functions, in a graph for as long as the process lives.
    reference = weakref.ref(use)

    @tf.custom_gradient
    def probe(tensor: tf.Tensor) -> tuple[tf.Tensor, Callable[[tf.Tensor], tf.Tensor]]:
        return tf.identity(tensor), lambda derivative: _received(reference, derivative)

    # Backward passes come by only where something depends on what they are for.
    @tf.custom_gradient
    def probe_of_zeros(
        zeros: tf.Tensor, kernel: tf.Tensor
    ) -> tuple[tf.Tensor, Callable[[tf.Tensor], tuple[tf.Tensor, tf.Tensor]]]:
        nothing = tf.zeros_like(kernel)
        return tf.identity(zeros), lambda derivative: (_received(reference, derivative), nothing)

    if use.is_added:
        return probe_of_zeros(use.pre_activation, tf.convert_to_tensor(use.kernel))
    return probe(use.pre_activation)


def _received(reference: "weakref.ref[Any]", derivative: tf.Tensor) -> tf.Tensor:
    use = reference()
    if use is None or _noticing.paused:
        return derivative
    derivative = tf.convert_to_tensor(derivative)
    # One that arrives in a loop's graph cannot be used outside.
    if differentiates_for(use.kernel) and _graph_of(derivative) is _graph_of(use.pre_activation):
        use.derivative = derivative if use.derivative is None else use.derivative + derivative
    if not is_recording():
        return derivative

    # Depends on the pre-activation by name only, so that a tape that watches the layer
    # records it even where the derivative itself is a constant.
    @tf.custom_gradient
    def second_probe(
        tensor: tf.Tensor, _: tf.Tensor
    ) -> tuple[tf.Tensor, Callable[[tf.Tensor], tuple[tf.Tensor, None]]]:
        return tf.identity(tensor), lambda upstream: (_differentiated(reference, upstream), None)

    return second_probe(derivative, use.pre_activation)


def _differentiated(reference: "weakref.ref[Any]", upstream: tf.Tensor) -> tf.Tensor:
    use = reference()
    if use is not None and differentiates_for(use.kernel):
        use.differentiated_again = True
    return upstream


def _graph_of(tensor: tf.Tensor) -> Any:
    return getattr(tensor, "graph", None)
