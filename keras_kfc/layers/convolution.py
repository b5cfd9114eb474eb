"""What all convolutions share, whatever their kind and number of axes."""

from typing import Any

import tensorflow as tf
from keras import ops

from keras_kfc.layers.instrumented import KroneckerLayer


class Convolution(KroneckerLayer):
    """A layer that convolves, and then adds a bias for each channel."""

    rank: int
    kernel_size: tuple[int, ...]
    strides: tuple[int, ...]
    padding: str
    dilation_rate: tuple[int, ...]
    data_format: str
    activation: Any

    def _completed(self, inputs: tf.Tensor, convolved: tf.Tensor, number: int = 0) -> tf.Tensor:
        """Adds the bias, records, and applies the activation.

        Args:
            inputs: Input of the convolution.
            convolved: Its output.
            number: Which of the layer's matrices it is.
        """
        if self.bias is not None:
            convolved = ops.add(convolved, along_channels(self.bias, self.rank, self.data_format))
        outputs = self._observe(inputs, convolved, number)
        return outputs if self.activation is None else self.activation(outputs)


class GroupedConvolution(Convolution):
    """One with a kernel `(..., J / G, I)`, as a map that has the layer's own options."""

    groups: int
    kernel: Any
    convolution_op: Any
    map_type: Any

    @property
    def linear_map(self) -> Any:
        """The layer's weights as a linear map."""
        *sizes, channels, filters = self.kronecker_kernel.shape
        options: list[Any] = [sizes, self.strides, self.dilation_rate]
        size, strides, dilation = (each[0] if self.rank == 1 else tuple(each) for each in options)
        return self.map_type(
            kernel_size=size,
            inputs=channels * self.groups,
            outputs=filters,
            strides=strides,
            padding=self.padding,
            dilation_rate=dilation,
            groups=self.groups,
            data_format=self.data_format,
        )

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        """Convolves, adds the bias, records, and applies the activation."""
        return self._completed(inputs, self.convolution_op(inputs, self.kernel))


def along_channels(bias: Any, rank: int, data_format: str) -> tf.Tensor:
    """A bias in a shape that is added to images of a number of axes."""
    ones = (1,) * rank
    return ops.reshape(bias, (1, *ones, -1) if data_format == "channels_last" else (1, -1, *ones))
