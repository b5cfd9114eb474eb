"""How the factors of one layer are stored: whole, or cut into diagonal blocks where too wide.

A factor of n rows takes n² numbers, and n³ products to invert. Beyond a limit its
channels are cut into *parts*, and correlations between channels of different parts
are taken to be zero: omega and gamma become block-diagonal. A convolution's kernel
positions stay together; the row of the bias belongs to the first part, and is zero in
the others.

Shapes: G groups; P parts of the input channels, of c channels each, and Q of the
output channels, of t each, the last filled up with zeros; R = kernel positions * c,
and one more with a bias. Omega is `(G * P, R, R)`, gamma `(G * Q, t, t)`, the weights
of a layer `(G, n, m)` as in `keras_kfc.maps.api`.
"""

import dataclasses
from collections.abc import Container, Sequence
from typing import ClassVar

import numpy as np
import tensorflow as tf

from keras_kfc.curvature.eigenform import Eigenform, eigenvectors_of
from keras_kfc.linalg.damping import BlockShape
from keras_kfc.linalg.products import matmul
from keras_kfc.maps.api import LinearMap, input_factor, output_factor, pad_and_split_columns
from keras_kfc.maps.sharing import reduced_input_factor, reduced_output_factor
from keras_kfc.utils.texts import inversion_costs_text


@dataclasses.dataclass(frozen=True)
class KroneckerLayout:
    """The layout of one layer's factors.

    Args:
        linear_map: The layer's weights as a linear map.
        use_bias: Whether they have a row for the bias.
        input_parts: P.
        output_parts: Q.
        weight_sharing: One of `keras_kfc.maps.sharing.WEIGHT_SHARING`.
    """

    linear_map: LinearMap
    use_bias: bool
    input_parts: int = 1
    output_parts: int = 1
    weight_sharing: str = "expand"
    symmetric_factors: ClassVar[Container[str]] = frozenset({"omega", "gamma"})
    gamma_has_unit_trace: ClassVar[bool] = False

    @property
    def _positions(self) -> int:
        return self.linear_map.kernel_rows // self._channels

    @property
    def _channels(self) -> int:
        return self.linear_map.inputs // self.linear_map.groups

    @property
    def _columns(self) -> int:
        return self.linear_map.outputs // self.linear_map.groups

    @property
    def omega_shape(self) -> tuple[int, int, int]:
        """`(G * P, R, R)`."""
        rows = self._positions * -(-self._channels // self.input_parts) + self.use_bias
        return (self.linear_map.groups * self.input_parts, rows, rows)

    @property
    def gamma_shape(self) -> tuple[int, int, int]:
        """`(G * Q, t, t)`."""
        columns = -(-self._columns // self.output_parts)
        return (self.linear_map.groups * self.output_parts, columns, columns)

    @property
    def block_shape(self) -> BlockShape:
        """Sizes of the whole block."""
        rows = self.linear_map.kernel_rows + self.use_bias
        return BlockShape(self.linear_map.groups, rows, self._columns)

    @property
    def omega_row_mask(self) -> np.ndarray:
        """Which rows of the stored input factor are the layer's, `(G * P, R)`; others fill up."""
        parts = -(-self._channels // self.input_parts)
        channels = np.arange(self.input_parts * parts).reshape(self.input_parts, 1, parts)
        rows = np.repeat(channels < self._channels, self._positions, axis=1)
        rows = rows.reshape(self.input_parts, -1)
        if self.use_bias:
            rows = np.column_stack([rows, np.arange(self.input_parts) == 0])
        return np.tile(rows, (self.linear_map.groups, 1))

    @property
    def gamma_row_mask(self) -> np.ndarray:
        """Which rows of the stored output factor are the layer's, `(G * Q, t)`."""
        columns = np.arange(self.output_parts * self.gamma_shape[1])
        rows = (columns < self._columns).reshape(self.output_parts, -1)
        return np.tile(rows, (self.linear_map.groups, 1))

    needs_inputs = False

    @property
    def factor_shapes(self) -> dict[str, tuple[int, int, int]]:
        """Shapes of the factors."""
        return {"omega": self.omega_shape, "gamma": self.gamma_shape}

    @property
    def inverse_shapes(self) -> dict[str, tuple[int, int, int]]:
        """Shapes of their damped inverses."""
        return {"omega_inverse": self.omega_shape, "gamma_inverse": self.gamma_shape}

    def from_inputs(
        self,
        inputs: Sequence[tf.Tensor],
        batch_size: tf.Tensor,
        masks: Sequence[tf.Tensor | None],
    ) -> tuple[tf.Tensor, ...]:
        """Omega of one batch."""
        if self.weight_sharing == "reduce":
            parts = self.input_parts
            return (
                reduced_input_factor(
                    self.linear_map, inputs, batch_size, self.use_bias, parts, masks
                ),
            )
        return (self.omega(inputs, batch_size, masks),)

    def from_pass(
        self,
        inputs: Sequence[tf.Tensor],
        derivatives: Sequence[tf.Tensor],
        batch_size: tf.Tensor,
        masks: Sequence[tf.Tensor | None],
    ) -> tuple[tf.Tensor, ...]:
        """Gamma of one batch and one backward pass."""
        del inputs
        if self.weight_sharing == "reduce":
            parts = self.output_parts
            return (reduced_output_factor(self.linear_map, derivatives, batch_size, parts, masks),)
        return (self.gamma(derivatives, masks),)

    def compromises(self, max_dim: int | None) -> list[str]:
        """What factors beyond the limit would have taken, and how they are cut."""
        del max_dim
        whole = KroneckerLayout(self.linear_map, self.use_bias)
        return [
            f"{name} factor of {before[1]} rows ({inversion_costs_text(before)}), "
            f"now {after[0]} blocks of {after[1]} rows ({inversion_costs_text(after)})"
            for name, before, after in (
                ("input", whole.omega_shape, self.omega_shape),
                ("output", whole.gamma_shape, self.gamma_shape),
            )
            if after != before
        ]

    def eigenform(self, factors: Sequence[np.ndarray]) -> Eigenform:
        """`Ω ⊗ Γ`, of factors that are whole."""
        (rows, left), (columns, right) = (eigenvectors_of(factor) for factor in factors)
        return Eigenform(self.block_shape, rows[:, :, None] * columns[:, None, :], left, right)

    def omega(
        self,
        inputs: Sequence[tf.Tensor],
        batch_size: tf.Tensor,
        masks: Sequence[tf.Tensor | None] | None = None,
    ) -> tf.Tensor:
        """Omega of one batch, `(G * P, R, R)`; see `keras_kfc.maps.api.input_factor`."""
        return input_factor(
            self.linear_map, inputs, batch_size, self.use_bias, self.input_parts, masks
        )

    def gamma(
        self,
        derivatives: Sequence[tf.Tensor],
        masks: Sequence[tf.Tensor | None] | None = None,
    ) -> tf.Tensor:
        """Gamma of one batch, `(G * Q, t, t)`; see `keras_kfc.maps.api.output_factor`."""
        return output_factor(self.linear_map, derivatives, self.output_parts, masks)

    def multiply(self, omega: tf.Tensor, joint: tf.Tensor, gamma: tf.Tensor) -> tf.Tensor:
        """`omega D gamma` for a matrix D of the layer's weights, `(G, n, m)`.

        The products take the same time in either order, `n m (R + t)` altogether.

        Args:
            omega: `(G * P, R, R)`.
            joint: D, `(G, n, m)`.
            gamma: `(G * Q, t, t)`.

        Returns:
            `(G, n, m)`.
        """
        if omega.shape[0] == gamma.shape[0] == 1:
            omega, joint, gamma = (tf.squeeze(part, axis=0) for part in (omega, joint, gamma))
            return tf.expand_dims(omega @ joint @ gamma, 0)
        return self._times_gamma(self._omega_times(omega, joint), gamma)

    def multiply_product(
        self, omega: tf.Tensor, inputs: tf.Tensor, derivatives: tf.Tensor, gamma: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """The two matrices of `omega Aᵀ E gamma = (omega Aᵀ) (E gamma)`.

        Args:
            omega: `(G * P, R, R)`.
            inputs: A, `(G, rows, n)`.
            derivatives: E, `(G, rows, m)`.
            gamma: `(G * Q, t, t)`.

        Returns:
            `(G, n, rows)` and `(G, rows, m)`.
        """
        if omega.shape[0] == gamma.shape[0] == 1:
            return matmul(omega, inputs, transpose_b=True), matmul(derivatives, gamma)
        left = self._omega_times(omega, tf.linalg.matrix_transpose(inputs))
        return left, self._times_gamma(derivatives, gamma)

    def costs(self) -> tuple[float, float]:
        """Products that `multiply` takes, and those of each row by `multiply_product`."""
        groups, rows, columns = self.block_shape
        ours, theirs = self.omega_shape[1], self.gamma_shape[1]
        whole = groups * rows * columns * (ours + theirs)
        return float(whole), float(groups * (rows * ours + columns * theirs))

    def _omega_times(self, omega: tf.Tensor, matrix: tf.Tensor) -> tf.Tensor:
        """`omega` times a matrix, `(G, n, k)`."""
        return self._join_rows(omega @ self._split_rows(matrix))

    def _times_gamma(self, matrix: tf.Tensor, gamma: tf.Tensor) -> tf.Tensor:
        """A matrix, `(G, k, m)`, times `gamma`."""
        columns = pad_and_split_columns(matrix, self.output_parts) @ gamma
        if self.output_parts == 1:
            return columns
        groups = matrix.shape[0]
        rows = tf.shape(matrix)[1] if matrix.shape[1] is None else matrix.shape[1]
        width = columns.shape[2]
        columns = tf.reshape(columns, (groups, self.output_parts, rows, width))
        columns = tf.transpose(columns, (0, 2, 1, 3))
        columns = tf.reshape(columns, (groups, rows, self.output_parts * width))
        return columns[:, :, : matrix.shape[2]]

    def _split_rows(self, joint: tf.Tensor) -> tf.Tensor:
        """`(G, n, m)` to `(G * P, R, m)`."""
        if self.input_parts == 1:
            return joint
        groups, rows, columns = joint.shape
        columns = tf.shape(joint)[2] if columns is None else columns
        channels = -(-self._channels // self.input_parts)
        kernel = joint[:, : self.linear_map.kernel_rows]
        kernel = tf.reshape(kernel, (groups, self._positions, self._channels, columns))
        filling = channels * self.input_parts - self._channels
        kernel = tf.pad(kernel, ((0, 0), (0, 0), (0, filling), (0, 0)))
        shape = (groups, self._positions, self.input_parts, channels, columns)
        kernel = tf.transpose(tf.reshape(kernel, shape), (0, 2, 1, 3, 4))
        kernel = tf.reshape(kernel, (groups, self.input_parts, self._positions * channels, columns))
        if rows > self.linear_map.kernel_rows:
            bias = joint[:, None, self.linear_map.kernel_rows :]
            bias = tf.pad(bias, ((0, 0), (0, self.input_parts - 1), (0, 0), (0, 0)))
            kernel = tf.concat((kernel, bias), axis=2)
        return tf.reshape(kernel, (groups * self.input_parts, -1, columns))

    def _join_rows(self, parts: tf.Tensor) -> tf.Tensor:
        """Undoes `_split_rows`."""
        if self.input_parts == 1:
            return parts
        groups, columns = self.linear_map.groups, parts.shape[2]
        columns = columns or tf.shape(parts)[2]
        rows = self._positions * (channels := -(-self._channels // self.input_parts))
        # Said, since it does not follow where the number of columns is not known.
        parts = tf.reshape(parts, (groups, self.input_parts, self.omega_shape[1], columns))
        kernel = parts[:, :, :rows]
        shape = (groups, self.input_parts, self._positions, channels, columns)
        kernel = tf.transpose(tf.reshape(kernel, shape), (0, 2, 1, 3, 4))
        kernel = tf.reshape(kernel, (groups, self._positions, -1, columns))
        kernel_shape = (groups, self.linear_map.kernel_rows, columns)
        kernel = tf.reshape(kernel[:, :, : self._channels], kernel_shape)
        return tf.concat((kernel, parts[:, 0, rows:]), axis=1) if self.use_bias else kernel


def layout_of(linear_map: LinearMap, use_bias: bool, max_dim: int | None) -> KroneckerLayout:
    """The fewest parts that keep the factors of a layer within a number of rows.

    A convolution's input channels are cut down to single channels at most, so that a
    kernel with more positions than `max_dim` stays above it; those of a grouped one into
    parts of equal size.

    Args:
        linear_map: The layer's weights as a linear map.
        use_bias: Whether they have a row for the bias.
        max_dim: The number of rows, or None for no limit.
    """
    whole = KroneckerLayout(linear_map, use_bias)
    if max_dim is None:
        return whole
    columns = whole.gamma_shape[1]
    output_parts = -(-columns // max_dim)
    channels = linear_map.inputs // linear_map.groups
    positions = linear_map.kernel_rows // channels
    widest = max(1, (max_dim - use_bias) // positions)
    input_parts = -(-channels // widest)
    if linear_map.groups > 1:
        input_parts = next(p for p in range(input_parts, channels + 1) if channels % p == 0)
    return KroneckerLayout(linear_map, use_bias, input_parts, output_parts)
