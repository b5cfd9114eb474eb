"""A dense layer's weights as a linear map."""

import dataclasses
import functools
import operator
from typing import Any

import tensorflow as tf

from keras_kfc.linalg.precision import at_least_float32
from keras_kfc.linalg.products import gram, sum_of_rows
from keras_kfc.maps.api import dimension, pad_and_split_columns, without_bias_row


@dataclasses.dataclass(frozen=True)
class DenseMap:
    """How a Dense layer's tensors map to its weights with bias.

    Args:
        inputs: Size of the last axis of the layer's input, J.
        outputs: Number of units, I.
    """

    inputs: int
    outputs: int
    groups: int = dataclasses.field(default=1, init=False)
    keeps_positions: bool = dataclasses.field(default=True, init=False)

    @property
    def kernel_rows(self) -> int:
        """Rows of the weights with bias that belong to the kernel."""
        return self.inputs

    def input_moments(self, inputs: tf.Tensor, parts: int = 1) -> tuple[tf.Tensor, tf.Tensor]:
        """Sums of `a aᵀ` and `a` over examples and middle axes, `(P, c, c)` and `(P, c)`.

        P is the number of parts that inputs are cut into, of c inputs each, the last one
        filled up with zeros.
        """
        rows = pad_and_split_columns(self.input_rows(inputs), parts)
        return gram(rows), sum_of_rows(rows)

    def input_rows(self, inputs: tf.Tensor) -> tf.Tensor:
        """Flattens `(B, ..., J)` to `(1, positions of all examples, J)`."""
        return tf.reshape(at_least_float32(inputs), (1, -1, self.inputs))

    def count_positions(self, inputs: tf.Tensor) -> Any:
        """Number of output positions of all examples together, a scalar."""
        axes = range(len(inputs.shape) - 1)
        return functools.reduce(operator.mul, (dimension(inputs, axis) for axis in axes))

    def derivative_rows(self, derivatives: tf.Tensor) -> tf.Tensor:
        """Flattens `(B, ..., I)` to `(1, positions of all examples, I)`."""
        return tf.reshape(at_least_float32(derivatives), (1, -1, self.outputs))

    def stack_bias(self, kernel: tf.Tensor, bias: tf.Tensor | None) -> tf.Tensor:
        """Joins kernel `(J, I)` and bias `(I,)` to `(1, n, I)`."""
        rows = kernel if bias is None else tf.concat((kernel, tf.expand_dims(bias, 0)), axis=0)
        return tf.expand_dims(rows, 0)

    def unstack_bias(self, weights: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor | None]:
        """Splits `(1, n, I)` into kernel `(J, I)` and bias `(I,)` (or None)."""
        return without_bias_row(tf.squeeze(weights, axis=0), self.inputs)
