"""The cell of convolutional recurrent layers, which records what both of its kernels do."""

from typing import Any

import keras
import tensorflow as tf
from keras import ops

from keras_kfc._compat.layer_hooks import ConvLSTMCell as KerasConvLSTMCell
from keras_kfc.layers.cells import Cell
from keras_kfc.layers.convolution import along_channels
from keras_kfc.layers.instrumented import instruments
from keras_kfc.maps.conv import Conv2DMap
from keras_kfc.maps.conv1d import Conv1DMap
from keras_kfc.maps.conv3d import Conv3DMap
from keras_kfc.maps.weights import WeightMatrix


@instruments(KerasConvLSTMCell)
@keras.saving.register_keras_serializable(package="keras_kfc")
class ConvLSTMCell(Cell, KerasConvLSTMCell):
    """The cell of `keras.layers.ConvLSTM2D` and its relatives, which KFC preconditions.

    With dropout, whose masks differ by gate, what is recorded of inputs and state is what comes
    before it.
    """

    # Pairs of positions are those of all steps and pixels.
    weight_sharing = "reduce"

    rank: int
    strides: tuple[int, ...]
    dilation_rate: tuple[int, ...]
    padding: str
    data_format: str

    @property
    def weight_matrices(self) -> tuple[WeightMatrix, ...]:
        """The kernel with the bias, and the recurrent kernel."""
        ones = (1,) * self.rank
        kernel = self._map(self.kernel, self.strides, self.padding, self.dilation_rate)
        recurrent = self._map(self.recurrent_kernel, ones, "same", ones)
        return self._matrices(kernel, recurrent, self.bias)

    def _map(self, kernel: Any, strides: Any, padding: str, dilation: Any) -> Any:
        sizes = tuple(kernel.shape)
        shape: Any = sizes[: self.rank]
        if self.rank == 1:
            shape, strides, dilation = shape[0], strides[0], dilation[0]
        kind: Any = (Conv1DMap, Conv2DMap, Conv3DMap)[self.rank - 1]
        if self.rank > 1:
            strides, dilation = tuple(strides), tuple(dilation)
        options = {"dilation_rate": dilation, "data_format": self.data_format}
        return kind(shape, *sizes[self.rank :], strides, padding, **options)

    def call(self, inputs: tf.Tensor, states: Any, training: bool | None = False) -> Any:
        """One step, which is recorded."""
        if not self._is_observed():
            return super().call(inputs, states, training=training)
        state, carry = states
        dropped = self._dropped(inputs, state, training)
        from_inputs = self._convolved(
            dropped[0],
            self.kernel,
            strides=self.strides,
            padding=self.padding,
            dilation_rate=self.dilation_rate,
        )
        if self.bias is not None:
            from_inputs = from_inputs + along_channels(self.bias, self.rank, self.data_format)
        from_inputs = self._observe(inputs, from_inputs, 0)
        from_state = self._convolved(dropped[1], self.recurrent_kernel, strides=1, padding="same")
        from_state = self._observe(state, from_state, 1)
        axis = 1 if self.data_format == "channels_first" else -1
        into, forget, candidate, out = ops.split(from_inputs + from_state, 4, axis=axis)
        carry = self.recurrent_activation(forget) * carry + self.recurrent_activation(
            into
        ) * self.activation(candidate)
        output = self.recurrent_activation(out) * self.activation(carry)
        return output, [output, carry]

    def _convolved(self, inputs: Any, kernel: Any, **options: Any) -> tf.Tensor:
        options["data_format"] = self.data_format
        if not isinstance(inputs, list):
            return ops.conv(inputs, kernel, **options)
        # A dropout mask for each gate.
        parts = ops.split(kernel, len(inputs), axis=-1)
        products = [ops.conv(x, part, **options) for x, part in zip(inputs, parts, strict=True)]
        return ops.concatenate(products, axis=1 if self.data_format == "channels_first" else -1)
