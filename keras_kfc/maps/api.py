"""A layer's weights as a linear map of its inputs, and the Kronecker factors that follow.

Shape convention, used by every module above this one. A layer's weights with bias
form one matrix `W̄` of shape `(G, n, m)`: G groups (1 for all but grouped
convolutions), rows in the kernel's own order with the bias as a last row
(`n = kh * kw * J / G + 1`, or without the `+ 1` if no bias is trained), a column
for each output channel of the group (`m = I / G`). The block of the Fisher
matrix is `Omega ⊗ Gamma` with

    omega  (G, n, n)   sum over positions, mean over examples, of  ā āᵀ
    gamma  (G, m, m)   mean over positions and examples, of  Ds Dsᵀ

where `ā` is the patch (for Dense: the input) with a 1 appended for the bias
and `Ds` the derivative of one example's loss with respect to the layer's
pre-activations. The uses of a layer that is called several times in one
forward pass count as further positions; positions that a mask leaves out count
in no sum and no mean. Source: Grosse & Martens (2016),
section 3.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import tensorflow as tf

from keras_kfc.linalg.products import gram


class LinearMap(Protocol):
    """One matrix of a layer: what a layer's tensors are to its weights."""

    @property
    def inputs(self) -> int:
        """Size of the input's channel axis, J, of all groups together."""

    @property
    def outputs(self) -> int:
        """Number of output channels, I, of all groups together."""

    @property
    def groups(self) -> int:
        """Number of channel groups, G; each is a block of its own."""

    @property
    def kernel_rows(self) -> int:
        """Rows of the weights with bias that belong to the kernel."""

    @property
    def keeps_positions(self) -> bool:
        """Whether a mask of the input is one of the output."""

    def input_moments(self, inputs: tf.Tensor, parts: int = 1) -> tuple[tf.Tensor, tf.Tensor]:
        """Sums of `a aᵀ` and `a` over examples and positions, `(G * P, c, c)` and `(G * P, c)`."""

    def input_rows(self, inputs: tf.Tensor) -> tf.Tensor:
        """What each output position sees, without the bias, `(G, positions, kernel_rows)`.

        Positions of an example follow each other. They may take many times the memory of the
        inputs: `input_moments` does without.
        """

    def count_positions(self, inputs: tf.Tensor) -> Any:
        """Number of output positions of all examples together: a scalar, or a number if known."""

    def derivative_rows(self, derivatives: tf.Tensor) -> tf.Tensor:
        """Flattens derivatives of pre-activations to `(G, positions of all examples, I / G)`."""

    def stack_bias(self, kernel: tf.Tensor, bias: tf.Tensor | None) -> tf.Tensor:
        """Joins kernel and bias to `(G, n, I / G)`."""

    def unstack_bias(self, weights: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor | None]:
        """Splits `(G, n, I / G)` into kernel and bias (or None)."""


def input_factor(
    linear_map: LinearMap,
    inputs: Sequence[tf.Tensor],
    batch_size: tf.Tensor,
    use_bias: bool,
    parts: int = 1,
    masks: Sequence[tf.Tensor | None] | None = None,
) -> tf.Tensor:
    """Omega of one batch.

    Args:
        linear_map: The layer's linear_map.
        inputs: What the layer saw, one tensor for each time it was called.
        batch_size: Number of examples B, a scalar.
        use_bias: Whether the weights have a row for the bias.
        parts: Number of diagonal blocks of each group's factor; the bias is in
            the first one, and its row is zero in the others.
        masks: For each input, which positions count, booleans of the shape of its first
            axes, or None for all.

    Returns:
        `(G * parts, n, n)`, float32 (float64 for float64 inputs).
    """
    masks = masks or [None] * len(inputs)
    inputs = [masked(tensor, mask) for tensor, mask in zip(inputs, masks, strict=True)]
    moments = [linear_map.input_moments(tensor, parts) for tensor in inputs]
    second_moment = tf.add_n([moment for moment, _ in moments])
    examples = tf.cast(batch_size, second_moment.dtype)
    if use_bias:
        patch_sum = tf.expand_dims(tf.add_n([total for _, total in moments]), 2)
        patches = tf.add_n(
            [
                _count(mask, linear_map.count_positions(tensor), second_moment.dtype)
                for tensor, mask in zip(inputs, masks, strict=True)
            ]
        )
        corner = tf.fill((linear_map.groups * parts, 1, 1), patches)
        if parts > 1:
            first = np.arange(linear_map.groups * parts)[:, None, None] % parts == 0
            first = first.astype(second_moment.dtype.as_numpy_dtype)
            patch_sum, corner = first * patch_sum, first * corner
        second_moment = tf.concat(
            (
                tf.concat((second_moment, patch_sum), axis=2),
                tf.concat((tf.linalg.matrix_transpose(patch_sum), corner), axis=2),
            ),
            axis=1,
        )
    return second_moment / examples


def output_factor(
    linear_map: LinearMap,
    derivatives: Sequence[tf.Tensor],
    parts: int = 1,
    masks: Sequence[tf.Tensor | None] | None = None,
) -> tf.Tensor:
    """Gamma of one batch and one draw of targets.

    Args:
        linear_map: The layer's linear_map.
        derivatives: `Ds`, derivatives of one example's loss (not of the mean
            over the batch), one tensor for each time the layer was called.
        parts: Number of diagonal blocks of each group's factor.
        masks: For each derivative, which positions count, booleans of the shape of its first
            axes, or None for all.

    Returns:
        `(G * parts, m, m)`, float32 (float64 for float64 derivatives); zeros if no position
        counts.
    """
    masks = masks or [None] * len(derivatives)
    rows = [
        linear_map.derivative_rows(masked(tensor, mask))
        for tensor, mask in zip(derivatives, masks, strict=True)
    ]
    total = tf.add_n([gram(pad_and_split_columns(tensor, parts)) for tensor in rows])
    count = tf.add_n(
        [
            _count(mask, dimension(tensor, 1), total.dtype)
            for tensor, mask in zip(rows, masks, strict=True)
        ]
    )
    return total / (count if masks.count(None) == len(masks) else tf.maximum(count, 1))


def masked(tensor: tf.Tensor, mask: tf.Tensor | None) -> tf.Tensor:
    """A tensor with zeros at the positions that do not count."""
    if mask is None:
        return tensor
    while len(mask.shape) < len(tensor.shape):
        mask = mask[..., None]
    return tf.where(mask, tensor, tf.zeros((), tensor.dtype))


def dimension(tensor: tf.Tensor, axis: int) -> Any:
    """The length of one axis, a number where it is known in the graph."""
    known = tensor.shape[axis]
    return tf.shape(tensor)[axis] if known is None else known


def _count(mask: tf.Tensor | None, positions: Any, dtype: tf.DType) -> tf.Tensor:
    """How many of a number of positions count, a scalar; a mask's may stand for several each."""
    positions = tf.cast(positions, dtype)
    if mask is None:
        return positions
    share = tf.math.divide_no_nan(positions, tf.cast(tf.size(mask), dtype))
    return share * tf.reduce_sum(tf.cast(mask, dtype))


def pad_and_split_columns(rows: tf.Tensor, parts: int) -> tf.Tensor:
    """Cuts `(G, N, m)` into `(G * parts, N, ceil(m / parts))`, filled up with zeros."""
    if parts == 1:
        return rows
    groups, _, columns = rows.shape
    width = -(-columns // parts)
    rows = tf.pad(rows, ((0, 0), (0, 0), (0, width * parts - columns)))
    rows = tf.transpose(tf.reshape(rows, (groups, -1, parts, width)), (0, 2, 1, 3))
    return tf.reshape(rows, (groups * parts, -1, width))


def without_bias_row(rows: tf.Tensor, count: int) -> tuple[tf.Tensor, tf.Tensor | None]:
    """Splits `(n, m)` into its first rows and the one of the bias, `(m,)` (or None)."""
    if rows.shape[0] == count:
        return rows, None
    kernel, bias = tf.split(rows, [count, 1])
    return kernel, tf.squeeze(bias, axis=0)
