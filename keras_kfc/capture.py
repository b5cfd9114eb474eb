"""What instrumented layers hand over during one forward pass.

A `Capture` is open while a model runs forward. Each instrumented layer records
its input `a` and pre-activation `s` in it; afterwards the capture can
differentiate the model's outputs with respect to every `s`, any number of
times, inside `tf.cond` too. There are two ways to get one:

* a custom training loop opens it as a context manager;
* a compiled model whose optimizer has Kronecker factors opens one by itself at
  the first instrumented layer of a training pass and closes it when it
  computes its loss; the optimizer collects it when it applies the gradients.

State is thread-local, because the replicas of a `tf.distribute` strategy trace
as interleaved threads.
"""

import dataclasses
import logging
import threading
import weakref
from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf
from keras.src.backend.common.global_state import get_global_attribute
from tensorflow.python.eager import record as tape_record

from keras_kfc.factors import Geometry

_logger = logging.getLogger("keras_kfc")


@dataclasses.dataclass
class LayerRecord:
    """All uses of one instrumented layer in one forward pass.

    Args:
        path: The layer's path, for messages.
        kernel: The layer's kernel variable.
        geometry: How its tensors map to Kronecker factors.
        has_bias: Whether the layer has a bias.
    """

    path: str
    kernel: keras.Variable
    geometry: Geometry
    has_bias: bool
    inputs: list[tf.Tensor] = dataclasses.field(default_factory=list)
    pre_activations: list[tf.Tensor] = dataclasses.field(default_factory=list)
    ordinary_derivatives: list[tf.Tensor] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class LossEvaluation:
    """One call of a compiled loss.

    Args:
        compiled: Keras's `CompileLoss`.
        y_true: Targets.
        y_pred: Outputs.
        sample_weight: Sample weights or None.
        value: The loss, without regularisation and added losses, a scalar.
    """

    compiled: Any
    y_true: Any
    y_pred: Any
    sample_weight: Any
    value: tf.Tensor


class Capture:
    """Records inputs and pre-activations of instrumented layers.

    Example:

    >>> layer = keras_kfc.layers.Dense(2)
    >>> with keras_kfc.Capture() as capture:
    ...     outputs = layer(np.ones((4, 3), "float32"))
    >>> capture.paths
    ['dense']
    """

    def __init__(self) -> None:
        self.records: dict[int, LayerRecord] = {}
        self.loss: LossEvaluation | None = None
        self.model: Any = None
        # Only pre-activations are watched: the tape holds what lies between
        # them and the outputs, nothing of the ordinary backward pass.
        self._tape = tf.GradientTape(persistent=True, watch_accessed_variables=False)
        self._graph: Any = None
        self.is_open = False

    def __enter__(self) -> "Capture":
        self.open()
        _state.explicit.append(self)
        return self

    def __exit__(self, *exception: object) -> None:
        _state.explicit.remove(self)
        self.close()

    def open(self) -> None:
        """Starts recording."""
        self._graph = _current_graph()
        self._tape.__enter__()
        self.is_open = True

    def close(self) -> None:
        """Stops recording; what was recorded stays."""
        if self.is_open:
            self._tape.__exit__(None, None, None)
            self.is_open = False

    def belongs_to_current_graph(self) -> bool:
        """Whether the capture was opened in the graph that is being built now."""
        return self._graph is not None and _current_graph() is self._graph

    @property
    def paths(self) -> list[str]:
        """Paths of the layers recorded so far, in the order of their first use."""
        return [record.path for record in self.records.values()]

    def record(self, layer: Any, inputs: tf.Tensor, pre_activation: tf.Tensor) -> None:
        """Takes one use of a layer.

        Args:
            layer: The instrumented layer.
            inputs: Its input `a`.
            pre_activation: Its pre-activation `s`.

        Raises:
            ValueError: If the layer runs inside a graph of its own (a loop, a
                `tf.function`, a recomputed block), whose tensors cannot be
                differentiated from outside.
        """
        if _current_graph() is not self._graph:
            raise _out_of_reach([layer.path])
        self._tape.watch(pre_activation)
        record_ = self._record_of(layer)
        if isinstance(inputs, tf.SparseTensor):
            inputs = tf.sparse.to_dense(inputs)
        if not inputs.dtype.is_floating:
            inputs = tf.cast(inputs, pre_activation.dtype)
        record_.inputs.append(inputs)
        record_.pre_activations.append(pre_activation)

    def check_reachable(self) -> None:
        """Makes sure that what was recorded can be used in the graph being built now.

        Raises:
            ValueError: If it was recorded inside another graph.
        """
        graph = _current_graph()
        while graph is not None and graph is not self._graph:
            graph = getattr(graph, "outer_graph", None)
        if graph is not self._graph:
            raise _out_of_reach(self.paths)

    def record_derivative(self, layer: Any, derivative: tf.Tensor) -> None:
        """Takes what the ordinary backward pass sends to a pre-activation."""
        self._record_of(layer).ordinary_derivatives.append(derivative)

    def differentiate(
        self, sources: Sequence[tf.Tensor], derivatives: Sequence[tf.Tensor]
    ) -> dict[int, list[tf.Tensor]]:
        """Runs one backward pass from the outputs to all pre-activations.

        Args:
            sources: Output tensors.
            derivatives: A tensor for each of them to start from.

        Returns:
            For each key of `records`, derivatives with respect to its
            pre-activations, zeros where an output does not depend on them.
        """
        flat = [s for record in self.records.values() for s in record.pre_activations]
        gradients = iter(
            self._tape.gradient(
                list(sources),
                flat,
                output_gradients=list(derivatives),
                unconnected_gradients=tf.UnconnectedGradients.ZERO,
            )
        )
        return {
            key: [next(gradients) for _ in record.pre_activations]
            for key, record in self.records.items()
        }

    def _record_of(self, layer: Any) -> LayerRecord:
        kernel = layer.kronecker_kernel
        if id(kernel) not in self.records:
            self.records[id(kernel)] = LayerRecord(
                layer.path, kernel, layer.kronecker_geometry, layer.bias is not None
            )
        return self.records[id(kernel)]


def active_capture(layer: Any) -> Capture | None:
    """The capture that a layer call belongs to, or None if nobody asked.

    Args:
        layer: The instrumented layer that is being called.
    """
    if _state.explicit:
        return _state.explicit[-1]
    # Not `layer._get_call_context()`, which leaves a context behind where there is none.
    context = get_global_attribute("current_call_ctx")
    model = getattr(context, "entry_layer", None)
    optimizer = getattr(model, "optimizer", None)
    part = model is not None and optimizer is None
    if part:
        # Part of a model, called by the train step of the whole.
        owner = getattr(layer.kronecker_kernel, "kronecker_owner", None)
        optimizer = None if owner is None else owner()
    optimizer = kronecker_optimizer(optimizer)
    if optimizer is None or not layer.kronecker_kernel.trainable:
        return None
    if getattr(context, "training", None) is False:
        return None
    pending = _state.pending.get(optimizer)
    if pending is not None and pending.capture.is_open:
        same_pass = pending.context is context
        # Several forward passes before one loss are one pass in a graph. In
        # eager mode the older one may be a pass that nobody finished, unless
        # this is another part of the model.
        new_part = part and id(layer.kronecker_kernel) not in pending.capture.records
        if same_pass or new_part or pending.capture.belongs_to_current_graph():
            return pending.capture
        pending.capture.close()
    if not tape_record.could_possibly_record():
        # A forward pass in training mode that nobody differentiates.
        return None
    watch_loss(model)
    capture = Capture()
    capture.model = model
    capture.open()
    if pending is not None and pending.capture.loss is not None:
        _logger.warning(
            "%s computed its loss more than once before the optimizer's step: the Kronecker "
            "factors come from the last time. To choose, use `keras_kfc.Capture` and "
            "`update_factors` in the train step.",
            type(model).__name__,
        )
    _state.pending[optimizer] = _Pending(context, capture)
    return capture


def take_pending(optimizer: Any) -> Capture | None:
    """Hands the capture of the last training pass to its optimizer, once.

    Args:
        optimizer: The optimizer with Kronecker factors.
    """
    pending = _state.pending.pop(optimizer, None)
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
    compiled = getattr(model, "_compile_loss", None)
    if compiled is None or "call" in vars(compiled):
        return
    original = compiled.call

    def call(y_true, y_pred, sample_weight=None):
        value = original(y_true, y_pred, sample_weight)
        optimizer = kronecker_optimizer(model.optimizer)
        pending = None if optimizer is None else _state.pending.get(optimizer)
        if pending is not None and pending.capture.is_open:
            pending.capture.close()
            pending.capture.loss = LossEvaluation(compiled, y_true, y_pred, sample_weight, value)
        return value

    compiled.call = call


def unwatch_loss(model: Any) -> None:
    """Undoes `watch_loss`."""
    compiled = getattr(model, "_compile_loss", None)
    if compiled is not None:
        vars(compiled).pop("call", None)


@dataclasses.dataclass
class _Pending:
    context: Any
    capture: Capture


class _State(threading.local):
    def __init__(self) -> None:
        self.explicit: list[Capture] = []
        self.pending: weakref.WeakKeyDictionary[Any, _Pending] = weakref.WeakKeyDictionary()


_state = _State()


def _out_of_reach(paths: list[str]) -> ValueError:
    return ValueError(
        f"Layer {', '.join(paths)} runs inside a loop, a tf.function or a recomputed block, where "
        "its statistics cannot be recorded. Let the fallback rule train it: use Keras's own layer "
        f"there, or `keras_kfc.instrument(model, exclude={paths})`."
    )


def _current_graph() -> Any:
    return None if tf.executing_eagerly() else tf.compat.v1.get_default_graph()
