"""A depthwise convolution's weights: those of a convolution with a group for each channel."""

import dataclasses
import functools

import tensorflow as tf

from keras_kfc._compat.tensorflow_internals import compiled_by_xla
from keras_kfc.linalg.precision import at_least_float32
from keras_kfc.maps.column import MapOfColumn
from keras_kfc.maps.conv import Conv2DMap


@dataclasses.dataclass(frozen=True)
class DepthwiseConv2DMap:
    """How a depthwise convolution's tensors map to its weights with bias.

    Args:
        kernel_size: `(kh, kw)`.
        inputs: Input channels J, each a group.
        depth_multiplier: Output channels of each input channel.
        strides: As in `keras.layers.DepthwiseConv2D`.
        padding: `"valid"` or `"same"`.
        dilation_rate: As in `keras.layers.DepthwiseConv2D`.
        data_format: `"channels_last"` or `"channels_first"`.
    """

    kernel_size: tuple[int, int]
    inputs: int
    depth_multiplier: int = 1
    strides: tuple[int, int] = (1, 1)
    padding: str = "valid"
    dilation_rate: tuple[int, int] = (1, 1)
    data_format: str = "channels_last"
    # A mask of the input says nothing of the output's positions: Keras drops it.
    keeps_positions: bool = dataclasses.field(default=False, init=False)

    @functools.cached_property
    def _grouped(self) -> Conv2DMap:
        return Conv2DMap(
            self.kernel_size,
            self.inputs,
            self.outputs,
            self.strides,
            self.padding,
            self.dilation_rate,
            self.inputs,
            self.data_format,
        )

    @property
    def groups(self) -> int:
        """Number of input channels."""
        return self.inputs

    @property
    def outputs(self) -> int:
        """Number of output channels."""
        return self.inputs * self.depth_multiplier

    @property
    def kernel_rows(self) -> int:
        """Number of kernel positions."""
        return self._grouped.kernel_rows

    def input_moments(self, inputs: tf.Tensor, parts: int = 1) -> tuple[tf.Tensor, tf.Tensor]:
        """Sums of `p pᵀ` and `p` over examples and positions, `(G, K, K)` and `(G, K)`."""
        del parts  # a single channel is not cut
        return self._grouped.input_moments(inputs)

    def input_rows(self, inputs: tf.Tensor) -> tf.Tensor:
        """Patches of each channel, `(G, positions of all examples, K)`."""
        return self._grouped.input_rows(inputs)

    def count_positions(self, inputs: tf.Tensor) -> tf.Tensor:
        """Number of output positions of all examples together, a scalar."""
        return self._grouped.count_positions(inputs)

    def derivative_rows(self, derivatives: tf.Tensor) -> tf.Tensor:
        """Flattens pre-activation derivatives to `(G, positions of all examples, D)`."""
        return self._grouped.derivative_rows(derivatives)

    def stack_bias(self, kernel: tf.Tensor, bias: tf.Tensor | None) -> tf.Tensor:
        """Joins kernel `(kh, kw, J, D)` and bias `(J * D,)` to `(G, n, D)`."""
        shape = (*self.kernel_size, 1, self.outputs)
        return self._grouped.stack_bias(tf.reshape(kernel, shape), bias)

    def unstack_bias(self, weights: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor | None]:
        """Splits `(G, n, D)` into kernel `(kh, kw, J, D)` and bias `(J * D,)` (or None)."""
        kernel, bias = self._grouped.unstack_bias(weights)
        shape = (*self.kernel_size, self.inputs, self.depth_multiplier)
        return tf.reshape(kernel, shape), bias

    def example_gradients(
        self, inputs: tf.Tensor, derivatives: tf.Tensor, use_bias: bool
    ) -> tf.Tensor:
        """Each example's derivative with regard to the weights, `(B, G, n, D)`."""
        images, derivatives = at_least_float32(inputs), at_least_float32(derivatives)
        if self.data_format == "channels_first":
            images, derivatives = (tf.transpose(x, (0, 2, 3, 1)) for x in (images, derivatives))
        # What TensorFlow has no kernels for on a processor; XLA makes a dense convolution of it.
        alone = self.strides[0] != self.strides[1] or max(self.dilation_rate) > 1
        alone = alone or compiled_by_xla()
        kernel = (self._by_position if alone else self._by_example)(images, derivatives)
        if use_bias:
            total = tf.reduce_sum(derivatives, axis=(1, 2))
            total = tf.reshape(total, (-1, self.inputs, 1, self.depth_multiplier))
            kernel = tf.concat((kernel, total), axis=2)
        shape = (None, self.inputs, self.kernel_rows + use_bias, self.depth_multiplier)
        return tf.ensure_shape(kernel, shape)

    def _by_example(self, images: tf.Tensor, derivatives: tf.Tensor) -> tf.Tensor:
        """Those of the kernel, `(B, G, K, D)`, with all channels of all examples as one image's."""

        def as_one_image(tensor: tf.Tensor) -> tf.Tensor:
            tensor = tf.transpose(tensor, (1, 2, 0, 3))
            sizes = tf.shape(tensor)
            return tf.reshape(tensor, (1, sizes[0], sizes[1], -1))

        examples, multiplier = tf.shape(images)[0], self.depth_multiplier
        kernel = tf.nn.depthwise_conv2d_backprop_filter(
            as_one_image(images),
            (*self.kernel_size, examples * self.inputs, multiplier),
            as_one_image(derivatives),
            (1, *self.strides, 1),
            self.padding.upper(),
        )
        kernel = tf.reshape(kernel, (self.kernel_rows, examples, self.inputs, multiplier))
        return tf.transpose(kernel, (1, 2, 0, 3))

    def _by_position(self, images: tf.Tensor, derivatives: tf.Tensor) -> tf.Tensor:
        """The same, a position of the kernel after the other: each sees a shifted image."""
        shape = tf.shape(derivatives)
        height, width = shape[1], shape[2]
        spans = [
            (size - 1) * rate + 1
            for size, rate in zip(self.kernel_size, self.dilation_rate, strict=True)
        ]
        needed = [
            (count - 1) * stride + span
            for count, stride, span in zip((height, width), self.strides, spans, strict=True)
        ]
        if self.padding == "same":
            missing = [
                tf.maximum(size - tf.shape(images)[axis], 0)
                for axis, size in zip((1, 2), needed, strict=True)
            ]
            paddings = [[part // 2, part - part // 2] for part in missing]
            images = tf.pad(images, [[0, 0], *paddings, [0, 0]])
        split = tf.reshape(derivatives, (shape[0], height, width, self.inputs, -1))
        rows = []
        for top in range(self.kernel_size[0]):
            for left in range(self.kernel_size[1]):
                starts = (top * self.dilation_rate[0], left * self.dilation_rate[1])
                seen = images[
                    :,
                    starts[0] : starts[0] + needed[0] - spans[0] + 1 : self.strides[0],
                    starts[1] : starts[1] + needed[1] - spans[1] + 1 : self.strides[1],
                ]
                rows.append(tf.reduce_sum(seen[..., None] * split, axis=(1, 2)))
        return tf.stack(rows, axis=2)


@dataclasses.dataclass(frozen=True)
class DepthwiseConv1DMap(MapOfColumn):
    """How a one-dimensional depthwise convolution's tensors map to its weights with bias.

    Args:
        kernel_size: Number of kernel positions, k.
        inputs: Input channels J, each a group.
        depth_multiplier: Output channels of each input channel.
        strides: As in `keras.layers.DepthwiseConv1D`.
        padding: `"valid"` or `"same"`.
        dilation_rate: As in `keras.layers.DepthwiseConv1D`.
        data_format: `"channels_last"` or `"channels_first"`.
    """

    kernel_size: int
    inputs: int
    depth_multiplier: int = 1
    strides: int = 1
    padding: str = "valid"
    dilation_rate: int = 1
    data_format: str = "channels_last"
    # A mask of the input says nothing of the output's positions: Keras drops it.
    keeps_positions: bool = dataclasses.field(default=False, init=False)

    @functools.cached_property
    def _plane(self) -> DepthwiseConv2DMap:
        """Positions in a column of width 1."""
        return DepthwiseConv2DMap(
            (self.kernel_size, 1),
            self.inputs,
            self.depth_multiplier,
            (self.strides, 1),
            self.padding,
            (self.dilation_rate, 1),
            self.data_format,
        )

    @property
    def groups(self) -> int:
        """Number of input channels."""
        return self.inputs

    @property
    def outputs(self) -> int:
        """Number of output channels."""
        return self.inputs * self.depth_multiplier

    def example_gradients(
        self, inputs: tf.Tensor, derivatives: tf.Tensor, use_bias: bool
    ) -> tf.Tensor:
        """Each example's derivative with regard to the weights, `(B, G, n, D)`."""
        parts = (self._widened(inputs), self._widened(derivatives))
        return self._plane.example_gradients(*parts, use_bias)
