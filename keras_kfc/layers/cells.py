"""Recurrent cells that record what both of their kernels do.

A cell has a kernel for inputs and a recurrent kernel for the state, with shared weights over time.
Where their products are added up, they are one matrix, whose block knows that inputs and states
are correlated. Where they are not (GRU, or a dropout mask for each gate), they are two.

Of the settings for weights that are shared, "expand" takes steps to be uncorrelated, as the paper
takes the positions of a convolution: the simplest model of Martens, Ba & Johnson (2018). "reduce"
takes them to be alike (`keras_kfc.maps.sharing`), and "trace", the default of cells, takes them
for what they are (`keras_kfc.maps.partial_traces`).
"""

import dataclasses
from typing import Any

import keras
import tensorflow as tf
from keras import ops

from keras_kfc.layers.instrumented import KroneckerLayer, instruments, is_marked
from keras_kfc.maps.dense import DenseMap
from keras_kfc.maps.gates import GatesMap
from keras_kfc.maps.weights import WeightMatrix
from keras_kfc.passes.automatic import active_capture


class Cell(KroneckerLayer):
    """What recurrent cells share."""

    kernel: Any
    recurrent_kernel: Any
    dropout: float
    recurrent_dropout: float

    def _joint_matrix(self) -> tuple[WeightMatrix, ...]:
        """Both kernels and the bias as one matrix."""
        rows = self.kernel.shape[0] + self.recurrent_kernel.shape[0]
        matrix = self._matrix(self.kernel, self.bias, DenseMap(rows, self.kernel.shape[1]))
        return (dataclasses.replace(matrix, further_kernels=(self.recurrent_kernel,)),)

    def _sum(self, inputs: tf.Tensor, state: tf.Tensor) -> tf.Tensor:
        """The sum of both products with the bias, as a capture sees it."""
        total = ops.matmul(inputs, self.kernel) + ops.matmul(state, self.recurrent_kernel)
        if self.bias is not None:
            total = total + self.bias
        return self._observe(ops.concatenate((inputs, state), axis=-1), total)

    def _matrices(self, kernel: Any, recurrent: Any, bias: Any) -> tuple[WeightMatrix, ...]:
        return (
            self._matrix(self.kernel, bias, kernel, "kernel"),
            self._matrix(self.recurrent_kernel, None, recurrent, "recurrent_kernel"),
        )

    def _is_observed(self) -> bool:
        return is_marked(self) and active_capture(self.kernel) is not None

    def _dropped(self, inputs: tf.Tensor, state: tf.Tensor, training: Any) -> tuple[Any, Any]:
        """Inputs and state behind dropout, one tensor each, or one for each gate."""
        masks: list[Any] = [None, None]
        if training and 0.0 < self.dropout < 1.0:
            masks[0] = self.get_dropout_mask(inputs)  # type: ignore[attr-defined]
        if training and 0.0 < self.recurrent_dropout < 1.0:
            masks[1] = self.get_recurrent_dropout_mask(state)  # type: ignore[attr-defined]
        return _masked(inputs, masks[0]), _masked(state, masks[1])

    def _product(self, inputs: Any, matrix: int) -> tf.Tensor:
        """Inputs times one of the kernels, `(B, gates * units)`, as a capture sees it."""
        weights = self.weight_matrices[matrix]
        if isinstance(inputs, list):
            # A dropout mask for each gate.
            parts = ops.split(weights.kernel, len(inputs), axis=1)
            products = [ops.matmul(x, part) for x, part in zip(inputs, parts, strict=True)]
            outputs = ops.concatenate(products, axis=-1)
            inputs = ops.stack(inputs, axis=1)
        else:
            outputs = ops.matmul(inputs, weights.kernel)
        return self._observe(inputs, outputs, matrix)


def _masked(tensor: tf.Tensor, mask: Any) -> Any:
    if mask is None:
        return tensor
    return [tensor * part for part in mask] if isinstance(mask, list) else tensor * mask


@instruments(keras.layers.SimpleRNNCell)
@keras.saving.register_keras_serializable(package="keras_kfc")
class SimpleRNNCell(Cell, keras.layers.SimpleRNNCell):
    """`keras.layers.SimpleRNNCell`, which `keras_kfc.KFC` preconditions.

    Example:

    >>> layer = keras.layers.RNN(keras_kfc.layers.SimpleRNNCell(4))
    >>> layer(np.ones((2, 5, 3), "float32")).shape
    TensorShape([2, 4])
    """

    @property
    def weight_matrices(self) -> tuple[WeightMatrix, ...]:
        """One of both kernels and the bias."""
        return self._joint_matrix()

    def call(self, sequence: tf.Tensor, states: Any, training: bool | None = False) -> Any:
        """One step, which is recorded."""
        if not self._is_observed():
            return super().call(sequence, states, training=training)
        state = states[0] if isinstance(states, (list, tuple)) else states
        output = self._sum(*self._dropped(sequence, state, training))
        if self.activation is not None:
            output = self.activation(output)
        return output, [output] if isinstance(states, (list, tuple)) else output


@instruments(keras.layers.LSTMCell)
@keras.saving.register_keras_serializable(package="keras_kfc")
class LSTMCell(Cell, keras.layers.LSTMCell):
    """`keras.layers.LSTMCell`, which `keras_kfc.KFC` preconditions.

    Example:

    >>> layer = keras.layers.RNN(keras_kfc.layers.LSTMCell(4))
    >>> layer(np.ones((2, 5, 3), "float32")).shape
    TensorShape([2, 4])
    """

    @property
    def weight_matrices(self) -> tuple[WeightMatrix, ...]:
        """One of both kernels and the bias; two if gates have dropout masks of their own."""
        inputs, states = self.dropout > 0, self.recurrent_dropout > 0
        if self.implementation != 1 or not (inputs or states):
            return self._joint_matrix()
        kernel = _gates_or_whole(self.kernel, 4, inputs)
        recurrent = _gates_or_whole(self.recurrent_kernel, 4, states)
        return self._matrices(kernel, recurrent, self.bias)

    def call(self, inputs: tf.Tensor, states: Any, training: bool | None = False) -> Any:
        """One step, which is recorded."""
        if not self._is_observed():
            return super().call(inputs, states, training=training)
        state, carry = states
        inputs, dropped = self._dropped(inputs, state, training)
        if len(self.weight_matrices) == 1:
            gates = self._sum(inputs, dropped)
        else:
            gates = self._product(inputs, 0) + self._product(dropped, 1)
            gates = gates if self.bias is None else gates + self.bias
        into, forget, candidate, out = ops.split(gates, 4, axis=1)
        carry = self.recurrent_activation(forget) * carry + self.recurrent_activation(
            into
        ) * self.activation(candidate)
        output = self.recurrent_activation(out) * self.activation(carry)
        return output, [output, carry]


@instruments(keras.layers.GRUCell)
@keras.saving.register_keras_serializable(package="keras_kfc")
class GRUCell(Cell, keras.layers.GRUCell):
    """`keras.layers.GRUCell`, which `keras_kfc.KFC` preconditions.

    Its two biases, with `reset_after=True`, are one variable, which has no block.

    Example:

    >>> layer = keras.layers.RNN(keras_kfc.layers.GRUCell(4))
    >>> layer(np.ones((2, 5, 3), "float32")).shape
    TensorShape([2, 4])
    """

    @property
    def weight_matrices(self) -> tuple[WeightMatrix, ...]:
        """The kernel, with the bias if there is one, and the recurrent kernel."""
        by_gate = self.implementation == 1
        kernel = _gates_or_whole(self.kernel, 3, self.dropout > 0 and by_gate)
        recurrent_by_gate = self.recurrent_dropout > 0 and by_gate
        recurrent = _gates_or_whole(
            self.recurrent_kernel, 3, recurrent_by_gate or not self.reset_after
        )
        return self._matrices(kernel, recurrent, None if self.reset_after else self.bias)

    def call(self, inputs: tf.Tensor, states: Any, training: bool | None = False) -> Any:
        """One step, which is recorded."""
        if not self._is_observed():
            return super().call(inputs, states, training=training)
        nested = keras.tree.is_nested(states)
        state = states[0] if nested else states
        inputs, dropped = self._dropped(inputs, state, training)
        biases: Any = (None, None)
        if self.bias is not None:
            biases = tuple(tf.unstack(self.bias)) if self.reset_after else (self.bias, None)
        from_inputs = self._product(inputs, 0)
        if biases[0] is not None:
            from_inputs = from_inputs + biases[0]
        x_update, x_reset, x_new = ops.split(from_inputs, 3, axis=-1)
        if self.reset_after:
            from_state = self._product(dropped, 1)
            if biases[1] is not None:
                from_state = from_state + biases[1]
            h_update, h_reset, h_new = ops.split(from_state, 3, axis=-1)
            update = self.recurrent_activation(x_update + h_update)
            reset = self.recurrent_activation(x_reset + h_reset)
            new = self.activation(x_new + reset * h_new)
        else:
            update, new = self._reset_before(dropped, (x_update, x_reset, x_new))
        output = update * state + (1 - update) * new
        return output, [output] if nested else output

    def _reset_before(self, state: Any, from_inputs: Any) -> tuple[tf.Tensor, tf.Tensor]:
        """Update gate and candidate where the reset gate comes before the product."""
        x_update, x_reset, x_new = from_inputs
        states = list(state) if isinstance(state, list) else [state] * 3
        kernels = ops.split(self.recurrent_kernel, 3, axis=1)
        # The reset gate is needed for the input of the third product, so that a capture cannot
        # be shown all three at once: it gets zeros that are added to them.
        zeros = ops.concatenate([ops.zeros_like(x) for x in from_inputs], axis=-1)
        probes = ops.split(self._observe(lambda: ops.stack(states, axis=1), zeros, 1), 3, axis=-1)
        reset = self.recurrent_activation(x_reset + ops.matmul(states[1], kernels[1]) + probes[1])
        states[2] = reset * states[2]
        update = self.recurrent_activation(x_update + ops.matmul(states[0], kernels[0]) + probes[0])
        return update, self.activation(x_new + ops.matmul(states[2], kernels[2]) + probes[2])


def _gates_or_whole(kernel: Any, gates: int, by_gate: bool) -> Any:
    """The map of a kernel whose gates share their input, or have inputs of their own."""
    inputs, outputs = kernel.shape
    return GatesMap(inputs, outputs, gates) if by_gate else DenseMap(inputs, outputs)
