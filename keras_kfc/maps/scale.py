"""A scale and a shift of each channel as a linear map: a group for each channel, of one input.

With the normalised input `x̂` and `s = γ x̂ + β`, a channel's weights with bias are the column
`(γ, β)`, or one of the two alone.
"""

import dataclasses
import math

import tensorflow as tf

from keras_kfc.linalg.precision import at_least_float32
from keras_kfc.linalg.products import gram, sum_of_rows


@dataclasses.dataclass(frozen=True)
class ScaleMap:
    """How the tensors of a layer that scales its channels map to its weights.

    Inputs are what is scaled, or ones where the layer has a shift alone, whose variable is the
    kernel then.

    Args:
        shape: Shape of the kernel.
        axes: For each of the kernel's axes the one of the layer's tensors, counted from either
            end; of an axis of size 1, along which all share one number, any.
    """

    shape: tuple[int, ...]
    axes: tuple[int, ...]
    kernel_rows: int = dataclasses.field(default=1, init=False)

    @property
    def _own(self) -> list[int]:
        return [axis for axis, size in zip(self.axes, self.shape, strict=True) if size > 1]

    @property
    def groups(self) -> int:
        """Number of channels."""
        return math.prod(self.shape)

    inputs = outputs = groups

    @property
    def keeps_positions(self) -> bool:
        """Whether axes that a mask may have are those of positions."""
        return all(axis == -1 or axis >= 2 for axis in self._own)

    def _axes_in(self, tensor: tf.Tensor) -> tuple[list[int], list[int]]:
        """The axes of channels and those of positions, counted from the front."""
        rank = len(tensor.shape)
        own = [axis % rank for axis in self._own]
        return own, [axis for axis in range(rank) if axis not in own]

    def _rows(self, tensor: tf.Tensor) -> tf.Tensor:
        own, positions = self._axes_in(tensor)
        tensor = tf.transpose(at_least_float32(tensor), [*own, *positions])
        return tf.reshape(tensor, (self.groups, -1, 1))

    def input_moments(self, inputs: tf.Tensor, parts: int = 1) -> tuple[tf.Tensor, tf.Tensor]:
        """Sums of `a²` and `a` over examples and positions, `(G, 1, 1)` and `(G, 1)`."""
        del parts  # a single input is not cut
        rows = self.input_rows(inputs)
        return gram(rows), sum_of_rows(rows)

    def input_rows(self, inputs: tf.Tensor) -> tf.Tensor:
        """What each channel is multiplied with, `(G, positions of all examples, 1)`."""
        return self._rows(inputs)

    def count_positions(self, inputs: tf.Tensor) -> tf.Tensor:
        """Number of positions of all examples together, a scalar."""
        return tf.size(inputs) // self.groups

    def derivative_rows(self, derivatives: tf.Tensor) -> tf.Tensor:
        """Derivatives of each channel, `(G, positions of all examples, 1)`."""
        return self._rows(derivatives)

    def stack_bias(self, kernel: tf.Tensor, bias: tf.Tensor | None) -> tf.Tensor:
        """Joins scale and shift to `(G, n, 1)`."""
        parts = [kernel] if bias is None else [kernel, bias]
        return tf.stack([tf.reshape(part, (self.groups, 1)) for part in parts], axis=1)

    def unstack_bias(self, weights: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor | None]:
        """Splits `(G, n, 1)` into scale and shift (or None)."""
        parts = [tf.reshape(row, self.shape) for row in tf.unstack(weights, axis=1)]
        return parts[0], parts[1] if len(parts) > 1 else None

    def example_gradients(
        self, inputs: tf.Tensor, derivatives: tf.Tensor, use_bias: bool
    ) -> tf.Tensor:
        """Each example's derivative with regard to the weights, `(B, G, n, 1)`."""
        derivatives = at_least_float32(derivatives)
        # Normalisations take inputs of any dtype.
        inputs = tf.cast(inputs, derivatives.dtype)
        products = [inputs * derivatives, derivatives] if use_bias else [inputs * derivatives]
        own, positions = self._axes_in(inputs)
        # Channels in the order of the kernel.
        order = [0, *(1 + sorted(own).index(axis) for axis in own)]
        sums = []
        for product in products:
            part = tf.reduce_sum(product, axis=positions[1:]) if positions[1:] else product
            part = part if order == sorted(order) else tf.transpose(part, order)
            sums.append(tf.reshape(part, (-1, self.groups, 1)))
        return tf.stack(sums, axis=2)
