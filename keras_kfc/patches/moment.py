"""Second moments of convolution patches: the sums behind the input factor Omega.

A patch `p` is what one output position of a convolution sees of its input,
flattened in the kernel's own order (kernel row, kernel column, channel). There
are three exact ways to sum `p pᵀ`, the cheapest of which is taken:

* `"spectral"` and `"windows"`: as autocorrelation of the images, without patches
  (`keras_kfc.patches.autocorrelation`); need static image sizes;
* `"im2col"`: patches laid out as rows of a matrix, in slices of the batch.

Pure functions of tensors: nothing here knows of layers.

Shapes: B examples, J input channels, G groups, K = kh * kw * J / G.
"""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from keras_kfc._compat.tensorflow_internals import compiled_by_xla
from keras_kfc.linalg.precision import at_least_float32
from keras_kfc.linalg.products import sum_of_rows
from keras_kfc.patches.autocorrelation import second_moment
from keras_kfc.patches.costs import cheapest_views, working_set_size
from keras_kfc.patches.geometry import Axis, axis_of
from keras_kfc.patches.im2col import SLICE_BYTES, in_slices, moments_by_patches
from keras_kfc.patches.row_views import RowEncoding
from keras_kfc.utils.arguments import check_choice, check_positive_integer

FORMS = ("spectral", "windows", "im2col")


def patch_second_moment(
    inputs: tf.Tensor,
    kernel_size: int | Sequence[int],
    strides: int | Sequence[int] = (1, 1),
    padding: str = "valid",
    dilation_rate: int | Sequence[int] = (1, 1),
    groups: int = 1,
    data_format: str = "channels_last",
    *,
    form: str | None = None,
) -> tuple[tf.Tensor, tf.Tensor]:
    """Sums `p pᵀ` and `p` over all patches of a batch.

    Zero padding counts: a tap that falls outside of the image contributes
    zeros, as it does in the convolution. Half-precision inputs are summed in
    float32. The result is exact up to rounding in every form; the sums are those
    of Grosse & Martens (2016), section 3, not divided by the number of examples.

    Args:
        inputs: Images, `(B, H, W, J)`, or `(B, J, H, W)` for
            `data_format="channels_first"`. B, H and W may be unknown when a
            graph is built; J may not.
        kernel_size: `(kh, kw)`, or one integer for both.
        strides: As in `keras.layers.Conv2D`.
        padding: `"valid"` or `"same"`.
        dilation_rate: As in `keras.layers.Conv2D`.
        groups: Number of channel groups; each sees its own `J / G` channels.
        data_format: `"channels_last"` or `"channels_first"`.
        form: How to compute it: `"spectral"`, `"windows"` or `"im2col"`. By
            default the cheapest for the sizes at hand. All work on slices of the
            batch, so that they hold about 128 MiB, or one image's share, at a time (the
            first two without slices if XLA compiles them).

    Returns:
        `(second_moment, patch_sum)` of shapes `(G, K, K)` and `(G, K)`, float32
        (float64 for float64 inputs).

    Raises:
        TypeError: If a size is not an integer.
        ValueError: If an argument is out of range, `groups` does not divide J, or
            `form` needs sizes that are not known or a smaller kernel.

    Example:

    >>> images = np.ones((2, 8, 8, 3), "float32")
    >>> moment, total = keras_kfc.patches.patch_second_moment(images, 3, padding="same")
    >>> moment.shape, total.shape
    (TensorShape([1, 27, 27]), TensorShape([1, 27]))
    >>> float(moment[0, 13, 13])  # the tap in the middle sees every pixel
    128.0
    """
    kernel = _pair("kernel_size", kernel_size)
    strides = _pair("strides", strides)
    dilation = _pair("dilation_rate", dilation_rate)
    padding = check_choice("padding", padding, ("valid", "same"))
    check_choice("data_format", data_format, ("channels_last", "channels_first"))
    groups = check_positive_integer("groups", groups)
    if form is not None:
        check_choice("form", form, FORMS)
    images = _images_of(inputs, data_format, groups)
    sizes = images.shape[1:3]
    if not sizes.is_fully_defined():
        if form not in (None, "im2col"):
            raise ValueError(
                f"Argument `form` can be {form!r} only for images of known height and width. "
                f"Received: inputs of shape {tuple(inputs.shape)}"
            )
        return moments_by_patches(images, kernel, strides, padding, dilation, groups)
    rows, columns = (
        axis_of(size, taps, stride, padding, rate)
        for size, taps, stride, rate in zip(sizes, kernel, strides, dilation, strict=True)
    )
    channels = images.shape[-1] // groups
    if rows.outputs == 0 or columns.outputs == 0:
        size = kernel[0] * kernel[1] * channels
        return tf.zeros((groups, size, size), images.dtype), tf.zeros((groups, size), images.dtype)
    views = None
    if form != "im2col":
        views = cheapest_views(rows, columns, groups, channels, form)
    if views is None:
        return moments_by_patches(images, kernel, strides, padding, dilation, groups)
    moments = _autocorrelation(rows, columns, views, groups, channels, images.dtype)
    if compiled_by_xla():
        return moments(images)
    bytes_each = images.dtype.size * working_set_size(rows, columns, groups, channels, views)
    return in_slices(images, max(1, SLICE_BYTES // bytes_each), moments)


def _pair(name: str, value: Any) -> tuple[int, int]:
    """Two positive integers, from one or two."""
    several = isinstance(value, Sequence) and not isinstance(value, str)
    values = tuple(value) if several else (value, value)
    if len(values) != 2:
        raise ValueError(
            f"Argument `{name}` must be an integer or two integers. Received: {name}={value!r}"
        )
    return check_positive_integer(name, values[0]), check_positive_integer(name, values[1])


def _images_of(inputs: tf.Tensor, data_format: str, groups: int) -> tf.Tensor:
    """The inputs as `(B, H, W, J)`, float32 or float64."""
    images = at_least_float32(tf.convert_to_tensor(inputs))
    if images.shape.rank != 4:
        raise ValueError(
            f"Argument `inputs` must have four axes. Received: shape {tuple(images.shape)}"
        )
    if data_format == "channels_first":
        images = tf.transpose(images, (0, 2, 3, 1))
    channels = images.shape[-1]
    if channels is None or channels % groups:
        raise ValueError(
            "Argument `groups` must divide the number of channels, which must be known. "
            f"Received: groups={groups}, {channels} channels"
        )
    return images


@functools.lru_cache(maxsize=512)
def _autocorrelation(
    rows: Axis,
    columns: Axis,
    views: tuple[RowEncoding, ...],
    groups: int,
    channels: int,
    dtype: tf.DType,
) -> Any:
    """A graph function that layers of the same geometry share, so that it is traced once."""

    def moments(images: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        images = images[:, : rows.size, : columns.size]
        # Sum over examples first: what is left is one image.
        total = sum_of_rows(tf.reshape(images, (-1, rows.size * columns.size * groups * channels)))
        total = tf.constant(_tap_counts(rows), dtype) @ tf.reshape(total, (rows.size, -1))
        total = tf.reshape(total, (rows.taps, columns.size, groups * channels))
        total = tf.constant(_tap_counts(columns), dtype) @ total
        total = tf.reshape(total, (rows.taps * columns.taps, groups, channels))
        total = tf.reshape(tf.transpose(total, (1, 0, 2)), (groups, -1))
        images = tf.reshape(images, (-1, rows.size, columns.size, groups, channels))
        moment = second_moment(images, rows, columns, views)
        return tf.ensure_shape(moment, (groups, total.shape[1], total.shape[1])), total

    signature = [tf.TensorSpec((None, None, None, groups * channels), dtype)]
    return tf.function(moments, input_signature=signature, autograph=False)


def _tap_counts(axis: Axis) -> np.ndarray:
    """`(taps, size)`: how often each tap sees each position (once or never)."""
    counts = np.zeros((axis.taps, axis.size))
    for tap in range(axis.taps):
        counts[tap, axis.seen(tap, tap)] = 1
    return counts
