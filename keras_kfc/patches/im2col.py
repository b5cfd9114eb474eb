"""Patches laid out as rows of a matrix, in slices of the batch."""

from collections.abc import Callable, Sequence

import tensorflow as tf

from keras_kfc._compat.tensorflow_internals import compiled_by_xla
from keras_kfc.linalg.products import gram, sum_of_rows

# Bytes of patches, or of what autocorrelation takes instead, that are held at a time.
SLICE_BYTES = 2**27


def extract_patches(
    images: tf.Tensor,
    kernel_size: Sequence[int],
    strides: Sequence[int] = (1, 1),
    padding: str = "valid",
    dilation_rate: Sequence[int] = (1, 1),
    groups: int = 1,
) -> tf.Tensor:
    """Lays out every patch of a batch of images as one row.

    Args:
        images: `(B, H, W, J)`.
        kernel_size: `(kh, kw)`.
        strides: As in `keras.layers.Conv2D`.
        padding: `"valid"` or `"same"`.
        dilation_rate: As in `keras.layers.Conv2D`.
        groups: Number of channel groups; each sees its own `J / G` channels.

    Returns:
        Patches, `(G, B * H_out * W_out, K)`, in the dtype of `images`.
    """
    channels = images.shape[-1]
    kernel_height, kernel_width = kernel_size
    if kernel_height == kernel_width == 1:
        # A 1x1 kernel sees single pixels: a strided slice, no gathering.
        rows = images[:, :: strides[0], :: strides[1], :] if max(strides) > 1 else images
    else:
        rows = tf.image.extract_patches(
            images,
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


def moments_by_patches(
    images: tf.Tensor,
    kernel: tuple[int, int],
    strides: tuple[int, int],
    padding: str,
    dilation: tuple[int, int],
    groups: int,
) -> tuple[tf.Tensor, tf.Tensor]:
    """The sums by laying out patches, a slice of the batch at a time."""

    def moments(part: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        patches = extract_patches(part, kernel, strides, padding, dilation, groups)
        return gram(patches), sum_of_rows(patches)

    if kernel == strides == (1, 1):
        return moments(images)
    shape = tf.shape(images, tf.int64)
    taps = kernel[0] * kernel[1]
    positions = (shape[1] // strides[0] + 1) * (shape[2] // strides[1] + 1)
    bytes_each = images.dtype.size * images.shape[-1] * taps * positions
    size = tf.maximum(SLICE_BYTES // tf.maximum(bytes_each, 1), 1)
    if compiled_by_xla():
        # Not even a slice that is never taken may be longer than the batch.
        size = tf.maximum(tf.minimum(size, shape[0]), 1)
    return in_slices(images, size, moments)


def in_slices(
    images: tf.Tensor,
    size: int | tf.Tensor,
    moments: Callable[[tf.Tensor], tuple[tf.Tensor, tf.Tensor]],
) -> tuple[tf.Tensor, tf.Tensor]:
    """Sums `moments` of slices of the batch, `size` images at a time."""
    batch = images.shape[0]
    if isinstance(size, int) and batch is not None and batch <= size:
        return moments(images)
    shape = tf.shape(images, tf.int64)
    count = shape[0] // size
    slices = tf.reshape(images[: count * size], tf.concat(((count, size), shape[1:]), axis=0))
    slices.set_shape((None, None, *images.shape[1:]))

    def add_slice(number: tf.Tensor, moment: tf.Tensor, total: tf.Tensor) -> tuple[tf.Tensor, ...]:
        more, more_total = moments(slices[number])
        return number + 1, moment + more, total + more_total

    # What is left over comes first; its sums have the shapes that the loop needs.
    start = moments(images[count * size :])
    _, moment, total = tf.while_loop(
        lambda number, *_: number < count,
        add_slice,
        (tf.zeros((), tf.int64), *start),
        parallel_iterations=1,
    )
    return moment, total
