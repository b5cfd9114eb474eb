"""What instrumented layers hand over during one forward pass.

A `Capture` is open while a model runs forward. Each instrumented layer records
its input `a` and pre-activation `s` in it; afterwards the capture can
differentiate the model's outputs with respect to every `s`, any number of
times, inside `tf.cond` too. There are two ways to get one:

* a custom training loop opens it as a context manager;
* a compiled model opens one by itself (`keras_kfc.passes.automatic`).

State is thread-local, because the replicas of a `tf.distribute` strategy trace
as interleaved threads.
"""

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import tensorflow as tf

from keras_kfc._compat.tensorflow_internals import current_graph, is_recording, outer_graph
from keras_kfc.maps.weights import WeightMatrix
from keras_kfc.passes.jacobian import Jacobian
from keras_kfc.passes.probes import unnoticed, with_probe
from keras_kfc.passes.records import LayerRecord, LossEvaluation, Use


class Capture:
    """Records inputs and pre-activations of instrumented layers.

    Args:
        variables: The model's trainable variables, which `KFC(step="quadratic")` needs to
            differentiate with regard to; by default none.

    Example:

    >>> layer = keras_kfc.layers.Dense(2)
    >>> with keras_kfc.Capture() as capture:
    ...     outputs = layer(np.ones((4, 3), "float32"))
    >>> capture.paths
    ['dense']
    """

    def __init__(self, variables: Iterable[Any] = ()) -> None:
        self.records: dict[int, LayerRecord] = {}
        self.loss: LossEvaluation | None = None
        self.model: Any = None
        # Computes the loss of this batch once more, at the weights of the moment.
        self.loss_again: Callable[[], tf.Tensor] | None = None
        self._watched = list(variables)
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
        self._graph = current_graph()
        self._tape.__enter__()
        for variable in self._watched:
            self._tape.watch(getattr(variable, "value", variable))
        self.is_open = True
        _opened.recording.append((weakref.ref(self), self._tape))

    def close(self) -> None:
        """Stops recording; what was recorded stays."""
        if self.is_open:
            self._tape.__exit__(None, None, None)
            self.is_open = False
            _opened.recording = [other for other in _opened.recording if other[0]() is not self]

    def stopped(self) -> Any:
        """A context in which what happens is not recorded for derivatives."""
        return self._tape.stop_recording()

    def has_derivatives(self) -> bool:
        """Whether an ordinary backward pass has reached anything that was recorded."""
        return any(record.differentiated_uses() for record in self.records.values())

    def was_opened_here(self) -> bool:
        """Whether the capture was opened in the graph that is being built now, or eagerly."""
        return current_graph() is self._graph

    @property
    def paths(self) -> list[str]:
        """Paths of the layers recorded so far, in the order of their first use."""
        return [record.path for record in self.records.values()]

    def record(
        self,
        path: str,
        matrix: WeightMatrix,
        inputs: Any,
        pre_activation: tf.Tensor,
        mask: tf.Tensor | None = None,
    ) -> tf.Tensor:
        """Takes one use of a matrix of an instrumented layer.

        Args:
            path: Path of the layer.
            matrix: The matrix.
            inputs: The matrix's input `a`, or a function that computes it.
            pre_activation: The pre-activation `s`.
            mask: Which positions count, or None for all.

        Returns:
            The pre-activation to go on with, which tells the use of its derivatives.

        Raises:
            ValueError: If the layer runs inside a graph of its own (a loop, a
                `tf.function`, a recomputed block), whose tensors cannot be
                differentiated from outside.
        """
        if current_graph() is not self._graph:
            raise _out_of_reach([path])
        return self.add_use(path, matrix, Use(matrix.kernel, inputs, pre_activation, mask))

    def add_use(self, path: str, matrix: WeightMatrix, use: Use) -> tf.Tensor:
        """Watches the pre-activation of a use; returns what to go on with in its place."""
        known = LayerRecord(matrix.path_in(path), matrix)
        use.pre_activation = with_probe(use)
        self._tape.watch(use.pre_activation)
        self.records.setdefault(id(matrix.kernel), known).uses.append(use)
        return use.pre_activation

    def check_reachable(self) -> None:
        """Makes sure that what was recorded can be used in the graph being built now.

        Raises:
            ValueError: If it was recorded inside another graph.
        """
        graph = current_graph()
        while graph is not None and graph is not self._graph:
            graph = outer_graph(graph)
        if graph is not self._graph:
            raise _out_of_reach(self.paths)

    def has_watched(self, variable: Any) -> bool:
        """Whether outputs can be differentiated with regard to a variable."""
        return any(variable is own for own in self._watched)

    def jacobian(self, sources: Sequence[tf.Tensor], variables: Sequence[Any]) -> Jacobian:
        """The Jacobian of some outputs with regard to variables that were watched."""
        return Jacobian(self._tape, sources, variables, unnoticed)

    def differentiate(
        self, sources: Sequence[tf.Tensor], derivatives: Sequence[tf.Tensor]
    ) -> dict[int, list[tf.Tensor | None]]:
        """Runs one backward pass from the outputs to all pre-activations.

        Args:
            sources: Output tensors.
            derivatives: A tensor for each of them to start from.

        Returns:
            For each key of `records`, derivatives with respect to the
            pre-activations of its uses, None where no output depends on one.
        """
        flat = [use.pre_activation for record in self.records.values() for use in record.uses]
        gradients = iter(
            self._tape.gradient(
                list(sources),
                flat,
                output_gradients=list(derivatives),
            )
        )
        return {key: [next(gradients) for _ in record.uses] for key, record in self.records.items()}


def innermost_capture() -> Capture | None:
    """The capture that was opened last as a context manager, or None."""
    return _opened.captures[-1] if _opened.captures else None


def close_captures_of_models() -> None:
    """Closes all captures of this thread but those that somebody opened as context managers."""
    for capture in _recording():
        if capture not in _opened.captures:
            capture.close()


def is_differentiated() -> bool:
    """Whether a tape records what happens now, other than those of captures."""
    with contextlib.ExitStack() as stack:
        for capture in _recording():
            stack.enter_context(capture._tape.stop_recording())
        return is_recording()


class _Opened(threading.local):
    def __init__(self) -> None:
        # Opened as context managers, innermost last.
        self.captures: list[Capture] = []
        # With its tape, which TensorFlow goes on with when the capture is gone.
        self.recording: list[tuple[weakref.ref[Capture], tf.GradientTape]] = []


def _recording() -> list[Capture]:
    """The open captures of this thread, once those are closed that were dropped open."""
    alive = []
    for reference, tape in _opened.recording:
        if reference() is None:
            tape.__exit__(None, None, None)
        else:
            alive.append((reference, tape))
    _opened.recording = alive
    return [capture for reference, _ in alive if (capture := reference()) is not None]


_opened = _Opened()


def _out_of_reach(paths: list[str]) -> ValueError:
    return ValueError(
        f"Layer {', '.join(paths)} runs inside a loop, a tf.function or a recomputed block, where "
        "its statistics cannot be recorded. Let the fallback rule train it: use Keras's own layer "
        f"there, or `keras_kfc.instrument(model, exclude={paths})`."
    )
