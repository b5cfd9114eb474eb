"""A two-dimensional convolution's weights as a linear map of its patches."""

import dataclasses
from typing import Any

import tensorflow as tf

from keras_kfc.linalg.precision import at_least_float32
from keras_kfc.maps.api import dimension, without_bias_row
from keras_kfc.patches.im2col import extract_patches
from keras_kfc.patches.moment import patch_second_moment


@dataclasses.dataclass(frozen=True)
class Conv2DMap:
    """How a two-dimensional convolution's tensors map to its weights with bias.

    Args:
        kernel_size: `(kh, kw)`.
        inputs: Input channels J, of all groups together.
        outputs: Output channels I, of all groups together.
        strides: As in `keras.layers.Conv2D`.
        padding: `"valid"` or `"same"`.
        dilation_rate: As in `keras.layers.Conv2D`.
        groups: Number of channel groups; each is a block of its own.
        data_format: `"channels_last"` or `"channels_first"`.
    """

    kernel_size: tuple[int, int]
    inputs: int
    outputs: int
    strides: tuple[int, int] = (1, 1)
    padding: str = "valid"
    dilation_rate: tuple[int, int] = (1, 1)
    groups: int = 1
    data_format: str = "channels_last"
    # A mask of the input says nothing of the output's positions: Keras drops it.
    keeps_positions: bool = dataclasses.field(default=False, init=False)

    @property
    def kernel_rows(self) -> int:
        """Rows of the weights with bias that belong to the kernel."""
        return self.kernel_size[0] * self.kernel_size[1] * self.inputs // self.groups

    def input_moments(self, inputs: tf.Tensor, parts: int = 1) -> tuple[tf.Tensor, tf.Tensor]:
        """Sums of `p pᵀ` and `p` over examples and positions, `(G * P, K, K)` and `(G * P, K)`.

        P is the number of parts that the channels of each group are cut into, the last
        one filled up with zeros if there is one group.
        """
        missing = -self.inputs % parts if self.groups == 1 else 0
        if missing:
            paddings = [[0, 0], [0, 0], [0, 0], [0, 0]]
            paddings[1 if self.data_format == "channels_first" else 3][1] = missing
            inputs = tf.pad(inputs, paddings)
        return patch_second_moment(
            inputs,
            self.kernel_size,
            self.strides,
            self.padding,
            self.dilation_rate,
            self.groups * parts,
            self.data_format,
        )

    def input_rows(self, inputs: tf.Tensor) -> tf.Tensor:
        """Patches of all positions, `(G, positions of all examples, K)`."""
        images = at_least_float32(inputs)
        if self.data_format == "channels_first":
            images = tf.transpose(images, (0, 2, 3, 1))
        return extract_patches(
            images, self.kernel_size, self.strides, self.padding, self.dilation_rate, self.groups
        )

    def count_positions(self, inputs: tf.Tensor) -> Any:
        """Number of output positions of all examples together, a scalar."""
        first = 2 if self.data_format == "channels_first" else 1
        count = 1
        for axis in range(2):
            size = dimension(inputs, first + axis)
            if self.padding == "valid":
                size -= self.dilation_rate[axis] * (self.kernel_size[axis] - 1)
            count *= -(-size // self.strides[axis])
        return count * dimension(inputs, 0)

    def derivative_rows(self, derivatives: tf.Tensor) -> tf.Tensor:
        """Flattens pre-activation derivatives to `(G, positions of all examples, I / G)`."""
        derivatives = at_least_float32(derivatives)
        if self.data_format == "channels_first":
            derivatives = tf.transpose(derivatives, (0, 2, 3, 1))
        if self.groups == 1:
            return tf.reshape(derivatives, (1, -1, self.outputs))
        rows = tf.reshape(derivatives, (-1, self.groups, self.outputs // self.groups))
        return tf.transpose(rows, (1, 0, 2))

    def stack_bias(self, kernel: tf.Tensor, bias: tf.Tensor | None) -> tf.Tensor:
        """Joins kernel `(kh, kw, J / G, I)` and bias `(I,)` to `(G, n, I / G)`."""
        rows = tf.reshape(kernel, (self.kernel_rows, self.outputs))
        if bias is not None:
            rows = tf.concat((rows, tf.expand_dims(bias, 0)), axis=0)
        if self.groups == 1:
            return tf.expand_dims(rows, 0)
        rows = tf.reshape(rows, (-1, self.groups, self.outputs // self.groups))
        return tf.transpose(rows, (1, 0, 2))

    def unstack_bias(self, weights: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor | None]:
        """Splits `(G, n, I / G)` into kernel `(kh, kw, J / G, I)` and bias `(I,)` (or None)."""
        if self.groups == 1:
            rows = tf.squeeze(weights, axis=0)
        else:
            rows = tf.reshape(tf.transpose(weights, (1, 0, 2)), (-1, self.outputs))
        kernel, bias = without_bias_row(rows, self.kernel_rows)
        shape = (*self.kernel_size, self.inputs // self.groups, self.outputs)
        return tf.reshape(kernel, shape), bias
