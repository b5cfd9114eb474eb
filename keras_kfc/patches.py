"""Second moments of convolution patches: the sums behind the input factor Omega.

A patch `p` is what one output position of a convolution sees of its input,
flattened in the kernel's own order (kernel row, kernel column, channel). Pure
functions of tensors: nothing here knows of layers.

Shapes: B examples, J input channels, G groups, K = kh * kw * J / G.
"""

from collections.abc import Sequence

import tensorflow as tf


def extract_patches(
    inputs: tf.Tensor,
    kernel_size: Sequence[int],
    strides: Sequence[int] = (1, 1),
    padding: str = "valid",
    dilation_rate: Sequence[int] = (1, 1),
    groups: int = 1,
    data_format: str = "channels_last",
) -> tf.Tensor:
    """Lays out every patch of a batch of images as one row.

    Args:
        inputs: Images, `(B, H, W, J)`, or `(B, J, H, W)` for
            `data_format="channels_first"`.
        kernel_size: `(kh, kw)`.
        strides: As in `keras.layers.Conv2D`.
        padding: `"valid"` or `"same"`.
        dilation_rate: As in `keras.layers.Conv2D`.
        groups: Number of channel groups; each sees its own `J / G` channels.
        data_format: `"channels_last"` or `"channels_first"`.

    Returns:
        Patches, `(G, B * H_out * W_out, K)`, in the dtype of `inputs`.
    """
    if data_format == "channels_first":
        inputs = tf.transpose(inputs, (0, 2, 3, 1))
    channels = inputs.shape[-1]
    kernel_height, kernel_width = kernel_size
    if kernel_height == kernel_width == 1:
        # A 1x1 kernel sees single pixels: a strided slice, no gathering.
        rows = inputs[:, :: strides[0], :: strides[1], :]
    else:
        rows = tf.image.extract_patches(
            inputs,
            sizes=(1, kernel_height, kernel_width, 1),
            strides=(1, *strides, 1),
            rates=(1, *dilation_rate, 1),
            padding=padding.upper(),
        )
    taps = kernel_height * kernel_width
    if groups == 1:
        return tf.reshape(rows, (1, -1, taps * channels))
    rows = tf.reshape(rows, (-1, taps, groups, channels // groups))
    rows = tf.transpose(rows, (2, 0, 1, 3))
    return tf.reshape(rows, (groups, -1, taps * channels // groups))


def patch_second_moment(
    inputs: tf.Tensor,
    kernel_size: Sequence[int],
    strides: Sequence[int] = (1, 1),
    padding: str = "valid",
    dilation_rate: Sequence[int] = (1, 1),
    groups: int = 1,
    data_format: str = "channels_last",
) -> tuple[tf.Tensor, tf.Tensor]:
    """Sums `p pᵀ` and `p` over all patches of a batch.

    Zero padding counts: a tap that falls outside of the image contributes
    zeros, as it does in the convolution. Half-precision inputs are summed in
    float32.

    Args:
        inputs: Images, `(B, H, W, J)`, or `(B, J, H, W)` for
            `data_format="channels_first"`.
        kernel_size: `(kh, kw)`.
        strides: As in `keras.layers.Conv2D`.
        padding: `"valid"` or `"same"`.
        dilation_rate: As in `keras.layers.Conv2D`.
        groups: Number of channel groups.
        data_format: `"channels_last"` or `"channels_first"`.

    Returns:
        `(second_moment, patch_sum)` of shapes `(G, K, K)` and `(G, K)`: the
        sums over all examples and positions, not divided by their number.
    """
    patches = extract_patches(
        at_least_float32(inputs), kernel_size, strides, padding, dilation_rate, groups, data_format
    )
    return tf.matmul(patches, patches, transpose_a=True), tf.reduce_sum(patches, axis=1)


def at_least_float32(tensor: tf.Tensor) -> tf.Tensor:
    """Casts to float32, except float64, which keeps its precision."""
    return tensor if tensor.dtype == tf.float64 else tf.cast(tensor, tf.float32)
