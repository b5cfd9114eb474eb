"""Kronecker factors Omega and Gamma of one layer, and the joint matrix they act on.

Shape convention, used by every module above this one. A layer's weights form
one *joint matrix* of shape `(G, n, m)`: G groups (1 for all but grouped
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

import dataclasses
from collections.abc import Sequence

import tensorflow as tf

from keras_kfc.patches import at_least_float32, gram, patch_second_moment, sum_of_rows


@dataclasses.dataclass(frozen=True)
class DenseGeometry:
    """How a Dense layer's tensors map to the joint matrix.

    Args:
        inputs: Size of the last axis of the layer's input, J.
        outputs: Number of units, I.
    """

    inputs: int
    outputs: int
    groups: int = dataclasses.field(default=1, init=False)

    @property
    def kernel_rows(self) -> int:
        """Rows of the joint matrix that belong to the kernel."""
        return self.inputs

    def input_moments(self, inputs: tf.Tensor, parts: int = 1) -> tuple[tf.Tensor, tf.Tensor]:
        """Sums of `a aᵀ` and `a` over examples and middle axes, `(P, c, c)` and `(P, c)`.

        P is the number of parts that inputs are cut into, of c inputs each, the last one
        filled up with zeros.
        """
        rows = split_columns(tf.reshape(at_least_float32(inputs), (1, -1, self.inputs)), parts)
        return gram(rows), sum_of_rows(rows)

    def count_positions(self, inputs: tf.Tensor) -> tf.Tensor:
        """Number of output positions of all examples together, a scalar."""
        return tf.reduce_prod(tf.shape(inputs)[:-1])

    def derivative_rows(self, derivatives: tf.Tensor) -> tf.Tensor:
        """Flattens `(B, ..., I)` to `(1, positions of all examples, I)`."""
        return tf.reshape(at_least_float32(derivatives), (1, -1, self.outputs))

    def to_joint(self, kernel: tf.Tensor, bias: tf.Tensor | None) -> tf.Tensor:
        """Joins kernel `(J, I)` and bias `(I,)` to `(1, n, I)`."""
        rows = kernel if bias is None else tf.concat((kernel, tf.expand_dims(bias, 0)), axis=0)
        return tf.expand_dims(rows, 0)

    def from_joint(self, joint: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor | None]:
        """Splits `(1, n, I)` into kernel `(J, I)` and bias `(I,)` (or None)."""
        rows = tf.squeeze(joint, axis=0)
        has_bias = joint.shape[1] > self.inputs
        return rows[: self.inputs], rows[self.inputs] if has_bias else None


@dataclasses.dataclass(frozen=True)
class ConvGeometry:
    """How a two-dimensional convolution's tensors map to the joint matrix.

    Args:
        kernel_size: `(kh, kw)`.
        inputs: Input channels J, of all groups together.
        outputs: Output channels I, of all groups together.
        strides: As in `keras.layers.Conv2D`.
        padding: `"valid"` or `"same"`.
        dilation_rate: As in `keras.layers.Conv2D`.
        groups: Number of channel groups; each is a block of its own.
        data_format: `"channels_last"` or `"channels_first"`.
    """

    kernel_size: tuple[int, int]
    inputs: int
    outputs: int
    strides: tuple[int, int] = (1, 1)
    padding: str = "valid"
    dilation_rate: tuple[int, int] = (1, 1)
    groups: int = 1
    data_format: str = "channels_last"

    @property
    def kernel_rows(self) -> int:
        """Rows of the joint matrix that belong to the kernel."""
        return self.kernel_size[0] * self.kernel_size[1] * self.inputs // self.groups

    def input_moments(self, inputs: tf.Tensor, parts: int = 1) -> tuple[tf.Tensor, tf.Tensor]:
        """Sums of `p pᵀ` and `p` over examples and positions, `(G * P, K, K)` and `(G * P, K)`.

        P is the number of parts that the channels of each group are cut into, the last
        one filled up with zeros if there is one group.
        """
        missing = -self.inputs % parts if self.groups == 1 else 0
        if missing:
            paddings = [[0, 0], [0, 0], [0, 0], [0, 0]]
            paddings[1 if self.data_format == "channels_first" else 3][1] = missing
            inputs = tf.pad(inputs, paddings)
        return patch_second_moment(
            inputs,
            self.kernel_size,
            self.strides,
            self.padding,
            self.dilation_rate,
            self.groups * parts,
            self.data_format,
        )

    def count_positions(self, inputs: tf.Tensor) -> tf.Tensor:
        """Number of output positions of all examples together, a scalar."""
        shape = tf.shape(inputs)
        first = 2 if self.data_format == "channels_first" else 1
        count = 1
        for axis in range(2):
            size = inputs.shape[first + axis]
            size = shape[first + axis] if size is None else size
            if self.padding == "valid":
                size -= self.dilation_rate[axis] * (self.kernel_size[axis] - 1)
            count *= -(-size // self.strides[axis])
        return count * shape[0]

    def derivative_rows(self, derivatives: tf.Tensor) -> tf.Tensor:
        """Flattens pre-activation derivatives to `(G, positions of all examples, I / G)`."""
        derivatives = at_least_float32(derivatives)
        if self.data_format == "channels_first":
            derivatives = tf.transpose(derivatives, (0, 2, 3, 1))
        if self.groups == 1:
            return tf.reshape(derivatives, (1, -1, self.outputs))
        rows = tf.reshape(derivatives, (-1, self.groups, self.outputs // self.groups))
        return tf.transpose(rows, (1, 0, 2))

    def to_joint(self, kernel: tf.Tensor, bias: tf.Tensor | None) -> tf.Tensor:
        """Joins kernel `(kh, kw, J / G, I)` and bias `(I,)` to `(G, n, I / G)`."""
        rows = tf.reshape(kernel, (self.kernel_rows, self.outputs))
        if bias is not None:
            rows = tf.concat((rows, tf.expand_dims(bias, 0)), axis=0)
        if self.groups == 1:
            return tf.expand_dims(rows, 0)
        rows = tf.reshape(rows, (-1, self.groups, self.outputs // self.groups))
        return tf.transpose(rows, (1, 0, 2))

    def from_joint(self, joint: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor | None]:
        """Splits `(G, n, I / G)` into kernel `(kh, kw, J / G, I)` and bias `(I,)` (or None)."""
        has_bias = joint.shape[1] > self.kernel_rows
        if self.groups == 1:
            rows = tf.squeeze(joint, axis=0)
        else:
            rows = tf.reshape(tf.transpose(joint, (1, 0, 2)), (-1, self.outputs))
        kernel = tf.reshape(
            rows[: self.kernel_rows],
            (*self.kernel_size, self.inputs // self.groups, self.outputs),
        )
        return kernel, rows[self.kernel_rows] if has_bias else None


Geometry = DenseGeometry | ConvGeometry


def input_factor(
    geometry: Geometry,
    inputs: Sequence[tf.Tensor],
    batch_size: tf.Tensor,
    use_bias: bool,
    parts: int = 1,
    masks: Sequence[tf.Tensor | None] | None = None,
) -> tf.Tensor:
    """Omega of one batch.

    Args:
        geometry: The layer's geometry.
        inputs: What the layer saw, one tensor for each time it was called.
        batch_size: Number of examples B, a scalar.
        use_bias: Whether the joint matrix has a row for the bias.
        parts: Number of diagonal blocks of each group's factor; the bias is in
            the first one, and its row is zero in the others.
        masks: For each input, which positions count, booleans of the shape of its first
            axes, or None for all.

    Returns:
        `(G * parts, n, n)`, float32 (float64 for float64 inputs).
    """
    masks = masks or [None] * len(inputs)
    inputs = [_masked(tensor, mask) for tensor, mask in zip(inputs, masks, strict=True)]
    moments = [geometry.input_moments(tensor, parts) for tensor in inputs]
    second_moment = tf.add_n([moment for moment, _ in moments])
    examples = tf.cast(batch_size, second_moment.dtype)
    if use_bias:
        patch_sum = tf.add_n([total for _, total in moments])[..., None]
        patches = tf.add_n(
            [
                _count(mask, geometry.count_positions(tensor), second_moment.dtype)
                for tensor, mask in zip(inputs, masks, strict=True)
            ]
        )
        corner = tf.fill((geometry.groups * parts, 1, 1), patches)
        if parts > 1:
            first = tf.constant([[[1.0]], *[[[0.0]]] * (parts - 1)], second_moment.dtype)
            first = tf.tile(first, (geometry.groups, 1, 1))
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
    geometry: Geometry,
    derivatives: Sequence[tf.Tensor],
    parts: int = 1,
    masks: Sequence[tf.Tensor | None] | None = None,
) -> tf.Tensor:
    """Gamma of one batch and one draw of targets.

    Args:
        geometry: The layer's geometry.
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
        geometry.derivative_rows(_masked(tensor, mask))
        for tensor, mask in zip(derivatives, masks, strict=True)
    ]
    total = tf.add_n([gram(split_columns(tensor, parts)) for tensor in rows])
    count = tf.add_n(
        [
            _count(mask, tf.shape(tensor)[1], total.dtype)
            for tensor, mask in zip(rows, masks, strict=True)
        ]
    )
    return total / (count if masks.count(None) == len(masks) else tf.maximum(count, 1))


def _masked(tensor: tf.Tensor, mask: tf.Tensor | None) -> tf.Tensor:
    """A tensor with zeros at the positions that do not count."""
    if mask is None:
        return tensor
    while len(mask.shape) < len(tensor.shape):
        mask = mask[..., None]
    return tf.where(mask, tensor, tf.zeros((), tensor.dtype))


def _count(mask: tf.Tensor | None, positions: tf.Tensor, dtype: tf.DType) -> tf.Tensor:
    """How many of a number of positions count, a scalar; a mask's may stand for several each."""
    positions = tf.cast(positions, dtype)
    if mask is None:
        return positions
    share = tf.math.divide_no_nan(positions, tf.cast(tf.size(mask), dtype))
    return share * tf.reduce_sum(tf.cast(mask, dtype))


def split_columns(rows: tf.Tensor, parts: int) -> tf.Tensor:
    """Cuts `(G, N, m)` into `(G * parts, N, ceil(m / parts))`, filled up with zeros."""
    if parts == 1:
        return rows
    groups, _, columns = rows.shape
    width = -(-columns // parts)
    rows = tf.pad(rows, ((0, 0), (0, 0), (0, width * parts - columns)))
    rows = tf.transpose(tf.reshape(rows, (groups, -1, parts, width)), (0, 2, 1, 3))
    return tf.reshape(rows, (groups * parts, -1, width))
