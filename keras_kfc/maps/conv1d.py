"""A one-dimensional convolution's weights, as those of a two-dimensional one of width 1."""

import dataclasses
import functools

import tensorflow as tf

from keras_kfc.maps.column import MapOfColumn
from keras_kfc.maps.conv import Conv2DMap


@dataclasses.dataclass(frozen=True)
class Conv1DMap(MapOfColumn):
    """How a one-dimensional convolution's tensors map to its weights with bias.

    Args:
        kernel_size: Number of kernel positions, k.
        inputs: Input channels J, of all groups together.
        outputs: Output channels I, of all groups together.
        strides: As in `keras.layers.Conv1D`.
        padding: `"valid"`, `"same"` or `"causal"`.
        dilation_rate: As in `keras.layers.Conv1D`.
        groups: Number of channel groups; each is a block of its own.
        data_format: `"channels_last"` or `"channels_first"`.
    """

    kernel_size: int
    inputs: int
    outputs: int
    strides: int = 1
    padding: str = "valid"
    dilation_rate: int = 1
    groups: int = 1
    data_format: str = "channels_last"
    # A mask of the input says nothing of the output's positions: Keras drops it.
    keeps_positions: bool = dataclasses.field(default=False, init=False)

    @functools.cached_property
    def _plane(self) -> Conv2DMap:
        return Conv2DMap(
            (self.kernel_size, 1),
            self.inputs,
            self.outputs,
            (self.strides, 1),
            "valid" if self.padding == "causal" else self.padding,
            (self.dilation_rate, 1),
            self.groups,
            self.data_format,
        )

    def _padded(self, inputs: tf.Tensor) -> tf.Tensor:
        if self.padding == "causal":
            missing = self.dilation_rate * (self.kernel_size - 1)
            paddings = [[0, 0], [0, 0], [0, 0]]
            paddings[2 if self.data_format == "channels_first" else 1][0] = missing
            inputs = tf.pad(inputs, paddings)
        return self._widened(inputs)
