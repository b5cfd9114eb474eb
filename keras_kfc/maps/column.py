"""One-dimensional convolutions as two-dimensional ones, of positions in a column of width 1."""

import abc
from typing import Any

import tensorflow as tf


class MapOfColumn(abc.ABC):
    """A linear map whose work another one does, along two axes.

    Attributes:
        data_format: `"channels_last"` or `"channels_first"`.
    """

    data_format: str

    @property
    @abc.abstractmethod
    def _plane(self) -> Any:
        """The map along two axes."""

    def _widened(self, tensor: tf.Tensor) -> tf.Tensor:
        """Positions in a column: `(B, L, C)` to `(B, L, 1, C)`."""
        return tf.expand_dims(tensor, 3 if self.data_format == "channels_first" else 2)

    def _padded(self, inputs: tf.Tensor) -> tf.Tensor:
        """What the map along two axes gets in place of the inputs."""
        return self._widened(inputs)

    @property
    def kernel_rows(self) -> int:
        """Rows of the weights with bias that belong to the kernel."""
        return int(self._plane.kernel_rows)

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
        """Joins kernel `(k, ..., ...)` and bias `(I,)` to `(G, n, I / G)`."""
        return self._plane.stack_bias(tf.expand_dims(kernel, 1), bias)

    def unstack_bias(self, weights: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor | None]:
        """Splits `(G, n, I / G)` into kernel `(k, ..., ...)` and bias `(I,)` (or None)."""
        kernel, bias = self._plane.unstack_bias(weights)
        return tf.squeeze(kernel, 1), bias
