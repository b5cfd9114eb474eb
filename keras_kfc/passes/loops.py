"""Captures that reach into a loop over time.

Tensors inside a loop cannot be differentiated from outside. But zeros that come in from
outside can: what is added to a pre-activation has the same derivative as it. So every use of a
matrix in a step of the loop gets a slice of such zeros, its probe, added to its pre-activation;
the derivatives of the probes are those of all steps, and the inputs of all steps leave the
loop as outputs. One use of the matrix is made of both, with the steps of an example as rows that
follow each other.

Whoever runs a loop first takes a survey of one step, which tells the uses and their shapes.
"""

import contextlib
import dataclasses
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_kfc.maps.dense import DenseMap
from keras_kfc.maps.weights import WeightMatrix
from keras_kfc.passes.capture import Capture
from keras_kfc.passes.records import Use


@dataclasses.dataclass
class _Slot:
    """One use of a matrix in every step."""

    path: str
    matrix: WeightMatrix
    pre_activation: tf.Tensor


class _Recorder:
    """What both of those below share."""

    def __init__(self) -> None:
        self._inputs: list[Any] = []

    def inputs(self) -> list[tf.Tensor]:
        """The inputs of all uses, once the step is made."""
        return [part() if callable(part) else part for part in self._inputs]


class _Survey(_Recorder):
    """Stands for the capture while one step is looked at, whose result nobody uses."""

    def __init__(self) -> None:
        super().__init__()
        self.slots: list[_Slot] = []

    def record(
        self,
        path: str,
        matrix: WeightMatrix,
        inputs: Any,
        pre_activation: tf.Tensor,
        mask: tf.Tensor | None = None,
    ) -> tf.Tensor:
        """Notes a use."""
        del mask
        self._inputs.append(inputs)
        self.slots.append(_Slot(path, matrix, pre_activation))
        return pre_activation


class _Step(_Recorder):
    """Stands for the capture in a step of the loop."""

    def __init__(self, probes: Sequence[tf.Tensor]):
        super().__init__()
        self._probes = iter(probes)

    def record(
        self,
        path: str,
        matrix: WeightMatrix,
        inputs: Any,
        pre_activation: tf.Tensor,
        mask: tf.Tensor | None = None,
    ) -> tf.Tensor:
        """Keeps the inputs and adds the probe."""
        del path, matrix, mask
        self._inputs.append(inputs)
        return pre_activation + next(self._probes)


class _Running(threading.local):
    def __init__(self) -> None:
        self.recorders: list[Any] = []


_running = _Running()


def recorder_of_loop() -> Any:
    """What stands for the capture in the loop whose step is being made, or None."""
    return _running.recorders[-1] if _running.recorders else None


@contextlib.contextmanager
def _records(recorder: Any) -> Iterator[None]:
    _running.recorders.append(recorder)
    try:
        yield
    finally:
        _running.recorders.pop()


Cell = Callable[[tf.Tensor, Any], tuple[tf.Tensor, Any]]


@dataclasses.dataclass(frozen=True)
class Loop:
    """A loop over time, as `keras.layers.RNN` runs it.

    Args:
        cell: A step: from inputs, `(B, ...)`, and nested states to an output and new states.
        sequences: Inputs of all steps, `(B, T, ...)`.
        states: States before the first step.
        mask: Which steps count, booleans `(B, T)` or `(B, T, 1)`, or None for all. In one that does
            not, states stay.
        backwards: Whether it begins with the last step.
        masked_output_is_zero: Whether the output of a step that does not count is zero, and not
            that of the step before.
    """

    cell: Cell
    sequences: tf.Tensor
    states: Any
    mask: tf.Tensor | None = None
    backwards: bool = False
    masked_output_is_zero: bool = False


def captured_loop(capture: Capture, loop: Loop) -> tuple[tf.Tensor, tf.Tensor, Any]:
    """Runs a loop over time such that a capture sees what layers do in it.

    Args:
        capture: The capture.
        loop: The loop.

    Returns:
        The last output, `(B, ...)`, the outputs of all steps in the order of the loop,
        `(B, T, ...)`, and the states at the end.
    """
    survey = _Survey()
    with _records(survey), capture.stopped():
        output, _ = loop.cell(loop.sequences[:, 0], loop.states)
        seen = survey.inputs()
    shape = tf.shape(loop.sequences)[:2]
    mask = None if loop.mask is None else tf.reshape(tf.cast(loop.mask, tf.bool), shape)
    flat_mask = None if mask is None else tf.reshape(mask, (-1,))
    uses, probes = [], []
    for slot in survey.slots:
        zeros = _zeros_for(slot.pre_activation, loop.sequences)
        keeps_time = _takes_time(slot.matrix)
        own = Use(slot.matrix.kernel, None, zeros, mask, is_added=True)
        if not keeps_time:
            own = dataclasses.replace(own, pre_activation=_flat(zeros), mask=flat_mask)
        watched = capture.add_use(slot.path, slot.matrix, own)
        uses.append(own)
        probes.append(watched if keeps_time else _by_step(watched, shape))
    outputs, inputs, states = _scan(loop, mask, output, probes, seen)
    matrices = [slot.matrix for slot in survey.slots]
    for use, matrix, rows in zip(uses, matrices, inputs, strict=True):
        steps = _batch_first(rows)
        use.inputs = steps if _takes_time(matrix) else _flat(steps)
    outputs = tf.reverse(outputs, (0,)) if loop.backwards else outputs
    return outputs[-1], _batch_first(outputs), states


def _scan(
    loop: Loop,
    mask: tf.Tensor | None,
    output: tf.Tensor,
    probes: Sequence[tf.Tensor],
    inputs: Sequence[tf.Tensor],
) -> tuple[tf.Tensor, Sequence[tf.Tensor], Any]:
    """Runs the steps; outputs and what each matrix saw, in the order of time, and the states."""
    first_states = keras.tree.flatten(loop.states)

    def advance(before: Any, elements: Any) -> Any:
        old_output, _, old_states = before
        current, slices, counts = elements
        recorder = _Step(slices)
        with _records(recorder):
            packed = keras.tree.pack_sequence_as(loop.states, list(old_states))
            new_output, new_states = loop.cell(current, packed)
        new_states = keras.tree.flatten(new_states)
        if mask is not None:
            instead = tf.zeros_like(new_output) if loop.masked_output_is_zero else old_output
            new_output = _where(counts, new_output, instead)
            pairs = zip(new_states, old_states, strict=True)
            new_states = [_where(counts, new, old) for new, old in pairs]
        pairs = zip(new_states, old_states, strict=True)
        new_states = [tf.ensure_shape(new, old.shape) for new, old in pairs]
        return tf.ensure_shape(new_output, old_output.shape), recorder.inputs(), new_states

    elements = (loop.sequences, list(probes), loop.sequences[..., 0] if mask is None else mask)
    start = (tf.zeros_like(output), [tf.zeros_like(part) for part in inputs], first_states)
    outputs, seen, states = tf.scan(
        advance,
        tf.nest.map_structure(_batch_first, elements),
        start,
        parallel_iterations=32,
        reverse=loop.backwards,
    )
    last = [part[0 if loop.backwards else -1] for part in states]
    return outputs, seen, keras.tree.pack_sequence_as(loop.states, last)


def _takes_time(matrix: WeightMatrix) -> bool:
    """Whether time may be one more axis of what a matrix sees; others see steps as examples."""
    return isinstance(matrix.linear_map, DenseMap)


def _where(counts: tf.Tensor, new: tf.Tensor, old: tf.Tensor) -> tf.Tensor:
    return tf.where(tf.reshape(counts, (-1, *[1] * (len(new.shape) - 1))), new, old)


def _batch_first(tensor: tf.Tensor) -> tf.Tensor:
    """Exchanges the first two axes."""
    return tf.transpose(tensor, (1, 0, *range(2, len(tensor.shape))))


def _flat(steps: tf.Tensor) -> tf.Tensor:
    """`(B, T, ...)` as `(B * T, ...)`."""
    rows = tf.reshape(steps, tf.concat(([-1], tf.shape(steps)[2:]), axis=0))
    return tf.ensure_shape(rows, (None, *steps.shape[2:]))


def _zeros_for(pre_activation: tf.Tensor, sequences: tf.Tensor) -> tf.Tensor:
    """Zeros for the pre-activations of all steps, `(B, T, ...)`."""
    own = tf.shape(pre_activation)[1:]
    zeros = tf.zeros(tf.concat((tf.shape(sequences)[:2], own), axis=0), pre_activation.dtype)
    return tf.ensure_shape(zeros, (*sequences.shape[:2], *pre_activation.shape[1:]))


def _by_step(rows: tf.Tensor, shape: tf.Tensor) -> tf.Tensor:
    """`(B * T, ...)` as `(B, T, ...)`."""
    steps = tf.reshape(rows, tf.concat((shape, tf.shape(rows)[1:]), axis=0))
    return tf.ensure_shape(steps, (None, None, *rows.shape[1:]))
