"""The kernel of a recurrent cell whose gates have inputs of their own, as a group for each gate."""

import dataclasses
import functools

import tensorflow as tf

from keras_kfc.maps.einsum import EinsumMap


@dataclasses.dataclass(frozen=True)
class GatesMap:
    """How the tensors of some gates map to their weights with bias.

    Inputs are `(B, gates, J)`, pre-activations `(B, gates * H)`.

    Args:
        size: Number of inputs of each gate, J.
        outputs: Number of units of all gates together.
        groups: Number of gates.
    """

    size: int
    outputs: int
    groups: int
    keeps_positions: bool = dataclasses.field(default=False, init=False)

    @functools.cached_property
    def _einsum(self) -> EinsumMap:
        units = self.outputs // self.groups
        return EinsumMap("bgj", "jgh", "bgh", (self.size, self.groups, units), (self.groups, units))

    @property
    def inputs(self) -> int:
        """Number of inputs of all gates together."""
        return self.size * self.groups

    @property
    def kernel_rows(self) -> int:
        """Rows of each gate's weights with bias that belong to the kernel."""
        return self.size

    def input_moments(self, inputs: tf.Tensor, parts: int = 1) -> tuple[tf.Tensor, tf.Tensor]:
        """Sums of `a aᵀ` and `a` over examples, `(G * P, c, c)` and `(G * P, c)`."""
        return self._einsum.input_moments(inputs, parts)

    def input_rows(self, inputs: tf.Tensor) -> tf.Tensor:
        """The inputs of each gate, `(G, positions of all examples, J)`."""
        return self._einsum.input_rows(inputs)

    def count_positions(self, inputs: tf.Tensor) -> tf.Tensor:
        """Number of positions of all examples together, a scalar."""
        return self._einsum.count_positions(inputs)

    def derivative_rows(self, derivatives: tf.Tensor) -> tf.Tensor:
        """Derivatives of each gate, `(G, positions of all examples, H)`."""
        units = self.outputs // self.groups
        return self._einsum.derivative_rows(tf.reshape(derivatives, (-1, self.groups, units)))

    def stack_bias(self, kernel: tf.Tensor, bias: tf.Tensor | None) -> tf.Tensor:
        """Joins kernel `(J, gates * H)` and bias `(gates * H,)` to `(G, n, H)`."""
        return self._einsum.stack_bias(tf.reshape(kernel, self._einsum.kernel_shape), bias)

    def unstack_bias(self, weights: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor | None]:
        """Splits `(G, n, H)` into kernel `(J, gates * H)` and bias `(gates * H,)` (or None)."""
        kernel, bias = self._einsum.unstack_bias(weights)
        kernel = tf.reshape(kernel, (self.size, self.outputs))
        return kernel, None if bias is None else tf.reshape(bias, (self.outputs,))
