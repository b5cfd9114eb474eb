"""Second moments of the patches that a three-dimensional convolution sees.

The planes that one output depth sees, one for each tap of the depth, are laid behind each
other as channels of one image. A convolution in two dimensions is left, whose patches have the
same entries in another order, (kernel row, kernel column, kernel depth, channel), and whose
second moments `keras_kfc.patches.moment` knows without the patches. So what is held for a volume
is as often as large as the kernel is deep, not as the kernel has taps.

Pure functions of tensors: nothing here knows of layers.

Shapes: B volumes `(D, H, W)` of J channels, G groups, K = kd * kh * kw * J / G.
"""

import math
from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from keras_kfc.linalg.precision import at_least_float32
from keras_kfc.patches.im2col import extract_patches
from keras_kfc.patches.moment import patch_second_moment

# Bytes of images, planes laid behind each other, that are held at a time.
_SLICE_BYTES = 2**27


def volume_second_moment(
    volumes: tf.Tensor,
    kernel_size: Sequence[int],
    strides: Sequence[int],
    padding: str,
    dilation_rate: Sequence[int],
    groups: int,
) -> tuple[tf.Tensor, tf.Tensor]:
    """Sums `p pᵀ` and `p` over all patches of a batch, a slice of the batch at a time.

    Args:
        volumes: `(B, D, H, W, J)`; all but J may be unknown when a graph is built.
        kernel_size: `(kd, kh, kw)`.
        strides: As in `keras.layers.Conv3D`.
        padding: `"valid"` or `"same"`.
        dilation_rate: As in `keras.layers.Conv3D`.
        groups: Number of channel groups; each sees its own `J / G` channels.

    Returns:
        `(second_moment, patch_sum)` of shapes `(G, K, K)` and `(G, K)`, float32
        (float64 for float64 volumes).
    """

    def moments(part: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        images = _planes_as_channels(
            part, kernel_size[0], strides[0], padding, dilation_rate[0], groups
        )
        return patch_second_moment(
            images, kernel_size[1:], strides[1:], padding, dilation_rate[1:], groups
        )

    shape = tf.shape(volumes, tf.int64)
    depths = output_size(shape[1], kernel_size[0], strides[0], padding, dilation_rate[0])
    bytes_each = max(4, volumes.dtype.size) * kernel_size[0] * depths * tf.reduce_prod(shape[2:])
    most = tf.maximum(_SLICE_BYTES // tf.maximum(bytes_each, 1), 1)
    count = tf.maximum(-(-shape[0] // most), 1)
    size = tf.maximum(-(-shape[0] // count), 1)
    # Volumes of zeros, which add nothing, make all slices equally long.
    slices = tf.pad(volumes, ((0, count * size - shape[0]), *[(0, 0)] * 4))
    slices = tf.reshape(slices, tf.concat(((count, size), shape[1:]), axis=0))
    slices.set_shape((None, None, *volumes.shape[1:]))

    def add_slice(number: tf.Tensor, moment: tf.Tensor, total: tf.Tensor) -> tuple[tf.Tensor, ...]:
        more, more_total = moments(slices[number])
        return number + 1, moment + more, total + more_total

    rows = math.prod(kernel_size) * volumes.shape[-1] // groups
    dtype = tf.float64 if volumes.dtype == tf.float64 else tf.float32
    _, moment, total = tf.while_loop(
        lambda number, *_: number < count,
        add_slice,
        (
            tf.zeros((), tf.int64),
            tf.zeros((groups, rows, rows), dtype),
            tf.zeros((groups, rows), dtype),
        ),
        parallel_iterations=1,
    )
    order = _order_of_kernel(kernel_size, volumes.shape[-1] // groups)
    moment = tf.gather(tf.gather(moment, order, axis=1), order, axis=2)
    return moment, tf.gather(total, order, axis=1)


def volume_patches(
    volumes: tf.Tensor,
    kernel_size: Sequence[int],
    strides: Sequence[int],
    padding: str,
    dilation_rate: Sequence[int],
    groups: int,
) -> tf.Tensor:
    """Lays out every patch of a batch of volumes as one row.

    Args:
        volumes: As in `volume_second_moment`.
        kernel_size: `(kd, kh, kw)`.
        strides: As in `keras.layers.Conv3D`.
        padding: `"valid"` or `"same"`.
        dilation_rate: As in `keras.layers.Conv3D`.
        groups: Number of channel groups; each sees its own `J / G` channels.

    Returns:
        Patches, `(G, output positions of all examples, K)`, float32 (float64 for float64
        volumes).
    """
    images = _planes_as_channels(
        at_least_float32(volumes), kernel_size[0], strides[0], padding, dilation_rate[0], groups
    )
    rows = extract_patches(images, kernel_size[1:], strides[1:], padding, dilation_rate[1:], groups)
    return tf.gather(rows, _order_of_kernel(kernel_size, volumes.shape[-1] // groups), axis=2)


def output_size(
    size: tf.Tensor, kernel: int, stride: int, padding: str, dilation: int
) -> tf.Tensor:
    """Number of output positions along one axis of a convolution, a scalar as `size` is."""
    if padding == "valid":
        size -= dilation * (kernel - 1)
    return tf.maximum(-(-size // stride), 0)


def _planes_as_channels(
    volumes: tf.Tensor, kernel: int, stride: int, padding: str, dilation: int, groups: int
) -> tf.Tensor:
    """The planes that each output depth sees as one image, `(B * D_out, H, W, G * kd * J / G)`."""
    shape = tf.shape(volumes)
    depths = output_size(shape[1], kernel, stride, padding, dilation)
    if padding == "same":
        missing = (depths - 1) * stride + dilation * (kernel - 1) + 1 - shape[1]
        missing = tf.maximum(missing, 0)
        before = missing // 2
        volumes = tf.pad(volumes, ((0, 0), (before, missing - before), (0, 0), (0, 0), (0, 0)))
    taps = [
        volumes[:, start : start + stride * depths : stride]
        for start in range(0, dilation * kernel, dilation)
    ]
    height, width, channels = volumes.shape[2:]
    height, width = (shape[2] if height is None else height, shape[3] if width is None else width)
    by_group = (-1, height, width, groups, channels // groups)
    images = tf.stack([tf.reshape(tap, by_group) for tap in taps], axis=-2)
    return tf.reshape(images, (-1, height, width, kernel * channels))


def _order_of_kernel(kernel_size: Sequence[int], channels: int) -> np.ndarray:
    """Where each row of the kernel is found among the entries of an image's patch."""
    depth, height, width = kernel_size
    entries = np.arange(depth * height * width * channels)
    return entries.reshape(height * width, depth, channels).swapaxes(0, 1).ravel()
