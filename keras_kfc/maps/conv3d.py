"""A three-dimensional convolution's weights as a linear map of its patches."""

import dataclasses
import functools
import math

import tensorflow as tf

from keras_kfc.maps.conv import Conv2DMap
from keras_kfc.patches.volumes import output_size, volume_patches, volume_second_moment


@dataclasses.dataclass(frozen=True)
class Conv3DMap:
    """How a three-dimensional convolution's tensors map to its weights with bias.

    Args:
        kernel_size: `(kd, kh, kw)`.
        inputs: Input channels J, of all groups together.
        outputs: Output channels I, of all groups together.
        strides: As in `keras.layers.Conv3D`.
        padding: `"valid"` or `"same"`.
        dilation_rate: As in `keras.layers.Conv3D`.
        groups: Number of channel groups; each is a block of its own.
        data_format: `"channels_last"` or `"channels_first"`.
    """

    kernel_size: tuple[int, int, int]
    inputs: int
    outputs: int
    strides: tuple[int, int, int] = (1, 1, 1)
    padding: str = "valid"
    dilation_rate: tuple[int, int, int] = (1, 1, 1)
    groups: int = 1
    data_format: str = "channels_last"
    # A mask of the input says nothing of the output's positions: Keras drops it.
    keeps_positions: bool = dataclasses.field(default=False, init=False)

    @functools.cached_property
    def _pointwise(self) -> Conv2DMap:
        """A map whose kernel has one position, and a channel for each of those in this kernel."""
        taps = math.prod(self.kernel_size)
        return Conv2DMap((1, 1), taps * self.inputs, self.outputs, groups=self.groups)

    def _channels_last(self, tensor: tf.Tensor) -> tf.Tensor:
        if self.data_format == "channels_first":
            tensor = tf.transpose(tensor, (0, 2, 3, 4, 1))
        return tensor

    @property
    def kernel_rows(self) -> int:
        """Rows of the weights with bias that belong to the kernel."""
        return self._pointwise.kernel_rows

    def input_moments(self, inputs: tf.Tensor, parts: int = 1) -> tuple[tf.Tensor, tf.Tensor]:
        """Sums of `p pᵀ` and `p` over examples and positions, `(G * P, K, K)` and `(G * P, K)`.

        P is the number of parts that the channels of each group are cut into, the last
        one filled up with zeros if there is one group.
        """
        volumes = self._channels_last(inputs)
        missing = -self.inputs % parts if self.groups == 1 else 0
        if missing:
            volumes = tf.pad(volumes, (*[(0, 0)] * 4, (0, missing)))
        return volume_second_moment(
            volumes,
            self.kernel_size,
            self.strides,
            self.padding,
            self.dilation_rate,
            self.groups * parts,
        )

    def input_rows(self, inputs: tf.Tensor) -> tf.Tensor:
        """Patches of all positions, `(G, positions of all examples, K)`."""
        return volume_patches(
            self._channels_last(inputs),
            self.kernel_size,
            self.strides,
            self.padding,
            self.dilation_rate,
            self.groups,
        )

    def count_positions(self, inputs: tf.Tensor) -> tf.Tensor:
        """Number of output positions of all examples together, a scalar."""
        shape = tf.shape(inputs)
        first = 2 if self.data_format == "channels_first" else 1
        count = shape[0]
        for axis, (taps, stride, dilation) in enumerate(
            zip(self.kernel_size, self.strides, self.dilation_rate, strict=True), first
        ):
            count *= output_size(shape[axis], taps, stride, self.padding, dilation)
        return count

    def derivative_rows(self, derivatives: tf.Tensor) -> tf.Tensor:
        """Flattens pre-activation derivatives to `(G, positions of all examples, I / G)`."""
        derivatives = self._channels_last(derivatives)
        return self._pointwise.derivative_rows(tf.reshape(derivatives, (-1, 1, 1, self.outputs)))

    def stack_bias(self, kernel: tf.Tensor, bias: tf.Tensor | None) -> tf.Tensor:
        """Joins kernel `(kd, kh, kw, J / G, I)` and bias `(I,)` to `(G, n, I / G)`."""
        return self._pointwise.stack_bias(tf.reshape(kernel, (1, 1, -1, self.outputs)), bias)

    def unstack_bias(self, weights: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor | None]:
        """Splits `(G, n, I / G)` into kernel `(kd, kh, kw, J / G, I)` and bias `(I,)` (or None)."""
        kernel, bias = self._pointwise.unstack_bias(weights)
        shape = (*self.kernel_size, self.inputs // self.groups, self.outputs)
        return tf.reshape(kernel, shape), bias
