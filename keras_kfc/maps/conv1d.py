"""A one-dimensional convolution's weights, as those of a two-dimensional one of width 1."""

import dataclasses
import functools

import tensorflow as tf

from keras_kfc.maps.conv import Conv2DMap


@dataclasses.dataclass(frozen=True)
class Conv1DMap:
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

    def _widened(self, tensor: tf.Tensor) -> tf.Tensor:
        """Positions in a column: `(B, L, C)` to `(B, L, 1, C)`."""
        return tf.expand_dims(tensor, 3 if self.data_format == "channels_first" else 2)

    def _padded(self, inputs: tf.Tensor) -> tf.Tensor:
        if self.padding == "causal":
            missing = self.dilation_rate * (self.kernel_size - 1)
            paddings = [[0, 0], [0, 0], [0, 0]]
            paddings[2 if self.data_format == "channels_first" else 1][0] = missing
            inputs = tf.pad(inputs, paddings)
        return self._widened(inputs)

    @property
    def kernel_rows(self) -> int:
        """Rows of the weights with bias that belong to the kernel."""
        return self._plane.kernel_rows

    def input_moments(self, inputs: tf.Tensor, parts: int = 1) -> tuple[tf.Tensor, tf.Tensor]:
        """Sums of `p pᵀ` and `p` over examples and positions, `(G * P, K, K)` and `(G * P, K)`."""
        return self._plane.input_moments(self._padded(inputs), parts)

    def input_rows(self, inputs: tf.Tensor) -> tf.Tensor:
        """Patches of all positions, `(G, positions of all examples, K)`."""
        return self._plane.input_rows(self._padded(inputs))

    def count_positions(self, inputs: tf.Tensor) -> tf.Tensor:
        """Number of output positions of all examples together, a scalar."""
        return self._plane.count_positions(self._padded(inputs))

    def derivative_rows(self, derivatives: tf.Tensor) -> tf.Tensor:
        """Flattens pre-activation derivatives to `(G, positions of all examples, I / G)`."""
        return self._plane.derivative_rows(self._widened(derivatives))

    def stack_bias(self, kernel: tf.Tensor, bias: tf.Tensor | None) -> tf.Tensor:
        """Joins kernel `(k, J / G, I)` and bias `(I,)` to `(G, n, I / G)`."""
        return self._plane.stack_bias(tf.expand_dims(kernel, 1), bias)

    def unstack_bias(self, weights: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor | None]:
        """Splits `(G, n, I / G)` into kernel `(k, J / G, I)` and bias `(I,)` (or None)."""
        kernel, bias = self._plane.unstack_bias(weights)
        return tf.squeeze(kernel, 1), bias
