"""What instrumented layers hand over during one forward pass.

A `Capture` is open while a model runs forward. Each instrumented layer records
its input `a` and pre-activation `s` in it; afterwards the capture can
differentiate the model's outputs with respect to every `s`, any number of
times, inside `tf.cond` too. There are two ways to get one:

* a custom training loop opens it as a context manager;
* a compiled model opens one by itself (`keras_kfc.pending`).

State is thread-local, because the replicas of a `tf.distribute` strategy trace
as interleaved threads.
"""

import dataclasses
import threading
from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_kfc.factors import Geometry


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

    def dense_inputs(self) -> list[tf.Tensor]:
        """The inputs as dense floating-point tensors; to be called where they are needed."""
        dense = [
            tf.sparse.to_dense(a) if isinstance(a, tf.SparseTensor) else a for a in self.inputs
        ]
        return [
            a if a.dtype.is_floating else tf.cast(a, s.dtype)
            for a, s in zip(dense, self.pre_activations, strict=True)
        ]


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
        _opened.captures.append(self)
        return self

    def __exit__(self, *exception: object) -> None:
        _opened.captures.remove(self)
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

    def was_opened_here(self) -> bool:
        """Whether the capture was opened in the graph that is being built now, or eagerly."""
        return _current_graph() is self._graph

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


def innermost_capture() -> Capture | None:
    """The capture that was opened last as a context manager, or None."""
    return _opened.captures[-1] if _opened.captures else None


class _Opened(threading.local):
    def __init__(self) -> None:
        self.captures: list[Capture] = []


_opened = _Opened()


def _out_of_reach(paths: list[str]) -> ValueError:
    return ValueError(
        f"Layer {', '.join(paths)} runs inside a loop, a tf.function or a recomputed block, where "
        "its statistics cannot be recorded. Let the fallback rule train it: use Keras's own layer "
        f"there, or `keras_kfc.instrument(model, exclude={paths})`."
    )


def _current_graph() -> Any:
    return None if tf.executing_eagerly() else tf.compat.v1.get_default_graph()
