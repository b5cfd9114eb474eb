"""A transposed convolution's weights: those of a convolution of its input, spread out.

A transposed convolution with stride s is a convolution with stride 1 of the input with s - 1 zeros
between its pixels, padded, with the kernel turned by half a turn. So the factors are those of that
convolution: a position is one of the output, and what it sees is mostly zeros.
"""

import dataclasses
import functools
from typing import Any

import tensorflow as tf

from keras_kfc.maps.conv import Conv2DMap
from keras_kfc.maps.conv1d import Conv1DMap
from keras_kfc.maps.conv3d import Conv3DMap


@dataclasses.dataclass(frozen=True)
class ConvTransposeMap:
    """How a transposed convolution's tensors map to its weights with bias.

    Args:
        kernel_size: Kernel positions along each of the one to three axes.
        inputs: Input channels J.
        outputs: Output channels I.
        strides: As in `keras.layers.Conv2DTranspose`, a number for each axis.
        padding: `"valid"` or `"same"`.
        output_padding: As in `keras.layers.Conv2DTranspose`, a number for each axis, or None.
        dilation_rate: Likewise.
        data_format: `"channels_last"` or `"channels_first"`.
    """

    kernel_size: tuple[int, ...]
    inputs: int
    outputs: int
    strides: tuple[int, ...]
    padding: str
    output_padding: tuple[int, ...] | None
    dilation_rate: tuple[int, ...]
    data_format: str = "channels_last"
    groups: int = dataclasses.field(default=1, init=False)
    # A mask of the input says nothing of the output's positions: Keras drops it.
    keeps_positions: bool = dataclasses.field(default=False, init=False)

    @functools.cached_property
    def _convolution(self) -> Any:
        """The convolution with stride 1 over the spread and padded input, channels last."""
        sizes = (self.inputs, self.outputs)
        if len(self.kernel_size) == 1:
            rate = self.dilation_rate[0]
            return Conv1DMap(self.kernel_size[0], *sizes, dilation_rate=rate)
        kind: Any = Conv2DMap if len(self.kernel_size) == 2 else Conv3DMap
        return kind(self.kernel_size, *sizes, dilation_rate=self.dilation_rate)

    def _channels_last(self, tensor: tf.Tensor) -> tf.Tensor:
        if self.data_format == "channels_last":
            return tensor
        rank = len(self.kernel_size)
        return tf.transpose(tensor, (0, *range(2, rank + 2), 1))

    def _spread(self, inputs: tf.Tensor) -> tf.Tensor:
        inputs = self._channels_last(inputs)
        paddings: list[Any] = [[0, 0]]
        for axis, stride in enumerate(self.strides):
            if stride > 1:
                inputs = _with_zeros_between(inputs, axis + 1, stride)
            paddings.append(self._padding_of(axis))
        return tf.pad(inputs, [*paddings, [0, 0]])

    def _padding_of(self, axis: int) -> tuple[int, int]:
        """Zeros before and after the spread input, such that the output has Keras's size.

        As TensorFlow has it, the output is what a convolution of stride s with this padding
        makes the input of: what that pads or leaves out in front is cut here.
        """
        stride, extra = self.strides[axis], None
        if self.output_padding is not None:
            extra = self.output_padding[axis]
        span = (self.kernel_size[axis] - 1) * self.dilation_rate[axis] + 1
        if self.padding == "valid":
            extra = max(span, stride) - span if extra is None else extra
            return span - 1, span - 1 + extra
        # Output size, less (inputs - 1) * stride.
        more = stride if extra is None else span % 2 + extra
        # The convolution back has n outputs of (n - 1) * stride + more inputs.
        cut = max(span - more, 0)
        before = span - 1 - cut // 2
        return before, span + more - 2 - before

    @property
    def kernel_rows(self) -> int:
        """Rows of the weights with bias that belong to the kernel."""
        return self._convolution.kernel_rows

    def input_moments(self, inputs: tf.Tensor, parts: int = 1) -> tuple[tf.Tensor, tf.Tensor]:
        """Sums of `p pᵀ` and `p` over examples and positions, `(P, K, K)` and `(P, K)`."""
        return self._convolution.input_moments(self._spread(inputs), parts)

    def input_rows(self, inputs: tf.Tensor) -> tf.Tensor:
        """What each output position sees, `(1, positions of all examples, K)`."""
        return self._convolution.input_rows(self._spread(inputs))

    def count_positions(self, inputs: tf.Tensor) -> tf.Tensor:
        """Number of output positions of all examples together, a scalar."""
        return self._convolution.count_positions(self._spread(inputs))

    def derivative_rows(self, derivatives: tf.Tensor) -> tf.Tensor:
        """Flattens pre-activation derivatives to `(1, positions of all examples, I)`."""
        return self._convolution.derivative_rows(self._channels_last(derivatives))

    def stack_bias(self, kernel: tf.Tensor, bias: tf.Tensor | None) -> tf.Tensor:
        """Joins kernel `(..., I, J)` and bias `(I,)` to `(1, n, I)`."""
        return self._convolution.stack_bias(self._turned(kernel), bias)

    def unstack_bias(self, weights: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor | None]:
        """Splits `(1, n, I)` into kernel `(..., I, J)` and bias `(I,)` (or None)."""
        kernel, bias = self._convolution.unstack_bias(weights)
        return self._turned(kernel), bias

    def _turned(self, kernel: tf.Tensor) -> tf.Tensor:
        """The kernel by half a turn, input and output channels exchanged."""
        rank = len(self.kernel_size)
        return tf.transpose(tf.reverse(kernel, range(rank)), (*range(rank), rank + 1, rank))


def _with_zeros_between(tensor: tf.Tensor, axis: int, stride: int) -> tf.Tensor:
    """Puts `stride - 1` zeros between the entries of an axis."""
    rank, size = len(tensor.shape), tf.shape(tensor)
    spread = tf.pad(
        tf.expand_dims(tensor, axis + 1),
        [[0, stride - 1 if i == axis + 1 else 0] for i in range(rank + 1)],
    )
    shape = tf.concat((size[:axis], [size[axis] * stride], size[axis + 1 :]), axis=0)
    spread = tf.reshape(spread, shape)
    static = list(tensor.shape)
    static[axis] = None if static[axis] is None else static[axis] * stride
    spread = tf.ensure_shape(spread, static)
    # Not behind the last one.
    return spread[(slice(None),) * axis + (slice(None, 1 - stride),)]
