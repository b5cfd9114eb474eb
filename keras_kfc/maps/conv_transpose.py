"""A transposed convolution's weights: those of a convolution of its input, spread out.

A transposed convolution with stride s is a convolution with stride 1 of the input with s - 1 zeros
between its pixels, padded, with the kernel turned by half a turn. So the factors are those of that
convolution: a position is one of the output, and what it sees is mostly zeros.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from keras_kfc.maps.conv import Conv2DMap
from keras_kfc.maps.conv1d import Conv1DMap
from keras_kfc.maps.conv3d import Conv3DMap


@dataclasses.dataclass(frozen=True)
class _Window:
    """The pixels that outputs of a transposed convolution see along one axis.

    Args:
        phases: For each tap, the number modulo the stride of the outputs that see pixels by it.
        offsets: The pixel that it shows, less the number of the output over the stride.
        more: How many more outputs a phase has than there are pixels.
    """

    phases: Sequence[int]
    offsets: Sequence[int]
    more: int

    @property
    def size(self) -> int:
        """Pixels of a window."""
        return max(self.offsets) - min(self.offsets) + 1

    @property
    def places(self) -> list[int]:
        """Place of each tap's pixel in the window."""
        return [offset - min(self.offsets) for offset in self.offsets]

    @property
    def _ends(self) -> tuple[int, int]:
        """Pixels to add before and after, where negative to leave out."""
        return -min(self.offsets), max(self.offsets) + self.more

    @property
    def padding(self) -> tuple[int, int]:
        """Zeros to add."""
        return max(self._ends[0], 0), max(self._ends[1], 0)

    def cut(self, images: tf.Tensor, axis: int) -> tf.Tensor:
        """Leaves out pixels that no output sees."""
        first, last = (max(-end, 0) for end in self._ends)
        places = slice(first, -last if last else None)
        return images[(slice(None),) * axis + (places,)]


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
        return self._convolution_of(self.kernel_size, self.dilation_rate)

    def _convolution_of(self, kernel: tuple[int, ...], rate: tuple[int, ...]) -> Any:
        sizes = (self.inputs, self.outputs)
        if len(kernel) == 1:
            return Conv1DMap(kernel[0], *sizes, dilation_rate=rate[0])
        kind: Any = Conv2DMap if len(kernel) == 2 else Conv3DMap
        return kind(kernel, *sizes, dilation_rate=rate)

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
        windows = [self._window_of(axis) for axis in range(len(self.kernel_size))]
        known = [window for window in windows if window is not None]
        if len(known) < len(windows) or max(self.strides) == 1:
            return self._convolution.input_moments(self._spread(inputs), parts)
        return self._moments_of_windows(inputs, known, parts)

    def _window_of(self, axis: int) -> "_Window | None":
        """What an output sees of the input itself along an axis, if all see as much."""
        stride, taps = self.strides[axis], self.kernel_size[axis]
        before, after = self._padding_of(axis)
        # Outputs of n inputs: (n - 1) * stride + 1, with the padding, less the kernel.
        more = before + after - (taps - 1) * self.dilation_rate[axis] + 1
        if more % stride or self.dilation_rate[axis] > 1:
            return None
        phases = [(before - tap) % stride for tap in range(taps)]
        offsets = [(phase + tap - before) // stride for tap, phase in enumerate(phases)]
        return _Window(phases, offsets, more // stride - 1)

    def _moments_of_windows(
        self, inputs: tf.Tensor, windows: Sequence["_Window"], parts: int
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """The sums without the zeros between pixels, of which a patch mostly consists.

        Each tap sees pixels in outputs of one phase alone, those whose number modulo the stride is
        a certain one, at a fixed distance. So what a tap adds to the sums is an entry of the
        sums over windows of the input, and two taps of different phases have nothing in common.
        """
        images = self._channels_last(inputs)
        images = tf.pad(images, [[0, 0], *(w.padding for w in windows), [0, 0]])
        for axis, window in enumerate(windows):
            images = window.cut(images, axis + 1)
        sizes = tuple(window.size for window in windows)
        convolution = self._convolution_of(sizes, (1,) * len(sizes))
        moment, total = convolution.input_moments(images, parts)
        places = np.ravel_multi_index(
            np.meshgrid(*(w.places for w in windows), indexing="ij"), sizes
        )
        numbers = np.meshgrid(*(w.phases for w in windows), indexing="ij")
        phases = np.stack([number.ravel() for number in numbers], axis=1)
        alike = (phases[:, None] == phases[None]).all(axis=-1)
        count, channels = moment.shape[0], moment.shape[-1] // int(np.prod(sizes))
        shape = (count, int(np.prod(sizes)), channels)
        moment = tf.reshape(moment, (*shape, *shape[1:]))
        for axis in (1, 3):
            moment = tf.gather(moment, places.ravel(), axis=axis)
        moment *= tf.cast(alike[:, None, :, None], moment.dtype)
        rows = places.size * channels
        total = tf.gather(tf.reshape(total, shape), places.ravel(), axis=1)
        return tf.reshape(moment, (count, rows, rows)), tf.reshape(total, (count, rows))

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
