"""Ways to lay out the rows of images so that Gram matrices give column sums.

The second moment of convolution patches sums products over output rows and
columns. `keras_kfc.patches.autocorrelation` goes through the rows; a *view* takes care of
the columns. It lays each row out as a vector such that the Gram matrix of these
vectors, times constant weights, gives the sums over output columns for all pairs
of tap columns. There are two:

* *windows*: overlapping windows of the row, each of which holds the taps of
  several neighbouring output columns;
* *spectral*: the row's Fourier transform, computed as a matrix product, since
  correlation becomes a product there. Zero padding keeps columns from meeting
  around the border; the output columns beyond the border, which the transform
  counts too, are subtracted by border windows.

Shapes: G groups of J channels each, B examples, H rows, W columns, D columns of a
view, P planes of it (frequencies; one for windows). All sizes but B are static.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import tensorflow as tf

from keras_kfc.patches.geometry import Axis


@dataclasses.dataclass(frozen=True, eq=False)
class RowEncoding:
    """One layout of rows.

    Args:
        planes: P.
        columns: D.
        repeats: Vectors for each row of an example (windows in a row).
        weights: Function that makes `(kw * kw, P * D * D)`: the sum for tap columns j and
            j' is the weighted sum of the Gram matrices' entries `[p, d, d']`. Not made
            before they are needed, since they can be large.
        encode: Function from images `(B, H, W, G, J)` to
            `(P, G, H, B * repeats, D * J)`.
        columns_first: Whether `encode` takes the images as `(W, H, B, G, J)`.
    """

    planes: int
    columns: int
    repeats: int
    weights: Callable[[], np.ndarray]
    encode: Callable[[tf.Tensor], tf.Tensor]
    columns_first: bool = False


@functools.lru_cache(maxsize=256)
def window_views(axis: Axis, outputs_per_window: int) -> tuple[RowEncoding, ...]:
    """Views of windows that hold the taps of several output columns.

    Args:
        axis: The axis that columns are counted along.
        outputs_per_window: Number of neighbouring output columns in a window.
    """
    count = -(-axis.outputs // outputs_per_window)
    hop = axis.stride * outputs_per_window
    start = axis.offsets[0]
    width = window_width(axis, outputs_per_window)
    weights = functools.partial(_count_positions, axis, range(outputs_per_window), start, width)

    # A window is a run of whole hops, and what is left of it.
    pieces = [(first, min(hop, width - hop * first)) for first in range(-(-width // hop))]

    def encode(images: tf.Tensor) -> tf.Tensor:
        rows, _, groups, channels = images.shape[1:]
        stop = start + hop * (count - 1 + len(pieces))
        images = images[:, :, :stop]
        padding = (-start, max(0, stop - axis.size))
        images = pad(images, ((0, 0), (0, 0), padding, (0, 0), (0, 0)))
        hops = tf.transpose(images, (3, 1, 0, 2, 4))
        hops = tf.reshape(hops, (groups, rows, -1, count - 1 + len(pieces), hop * channels))
        parts = [
            hops[:, :, :, first : first + count, : length * channels] for first, length in pieces
        ]
        windows = parts[0] if len(parts) == 1 else tf.concat(parts, axis=-1)
        return tf.reshape(windows, (1, groups, rows, -1, width * channels))

    main = RowEncoding(1, width, count, weights, encode)
    surplus = range(axis.outputs, count * outputs_per_window)
    return (main, *_border_views(axis, surplus))


def window_width(axis: Axis, outputs_per_window: int) -> int:
    """Number of input columns that hold the taps of neighbouring output columns."""
    return axis.stride * (outputs_per_window - 1) + axis.offsets[-1] - axis.offsets[0] + 1


@functools.lru_cache(maxsize=256)
def spectral_views(axis: Axis, parts: int) -> tuple[RowEncoding, ...]:
    """Views of the Fourier transform of rows.

    The frequencies are odd multiples of half the base frequency, which come in
    complex pairs without exception. With a stride, each phase of the columns counts
    as channels of its own.

    Args:
        axis: The axis that columns are counted along.
        parts: Number of views to divide the frequencies among.
    """
    columns = -(-axis.size // axis.stride)
    period = spectral_period(axis)
    lags = [offset // axis.stride for offset in axis.offsets]
    phases = [offset % axis.stride for offset in axis.offsets]
    angles = np.pi * np.arange(1, period, 2) / period

    def weights(chosen: slice) -> np.ndarray:
        shape = (axis.taps, axis.taps, len(angles[chosen]), axis.stride, 2, axis.stride, 2)
        made = np.zeros(shape)
        for j, k in itertools.product(range(axis.taps), repeat=2):
            turn = angles[chosen] * (lags[k] - lags[j])
            block = made[j, k, :, phases[j], :, phases[k], :]
            block[:, 0, 0] = block[:, 1, 1] = 2 / period * np.cos(turn)
            block[:, 1, 0] = 2 / period * np.sin(turn)
            block[:, 0, 1] = -block[:, 1, 0]
        return made.reshape(axis.taps**2, -1)

    def encode(images: tf.Tensor, chosen: slice) -> tf.Tensor:
        rows, _, groups, channels = images.shape[1:]
        images = pad(images, ((0, axis.stride * columns - axis.size), *[(0, 0)] * 4))
        # Real and imaginary part of the transform, as rows.
        turns = angles[chosen, None] * np.arange(columns)
        transform = np.stack([np.cos(turns), -np.sin(turns)], axis=1)
        planes = transform.shape[0]
        matrix = tf.constant(transform.reshape(-1, columns), images.dtype)
        spectra = matrix @ tf.reshape(images, (columns, -1))
        spectra = tf.reshape(spectra, (planes, 2, axis.stride, -1, groups, channels))
        spectra = tf.transpose(spectra, (0, 4, 3, 2, 1, 5))
        return tf.reshape(spectra, (planes, groups, rows, -1, 2 * axis.stride * channels))

    bounds = np.linspace(0, len(angles), min(parts, len(angles)) + 1).astype(int)
    views = [
        RowEncoding(
            stop - start,
            2 * axis.stride,
            1,
            functools.partial(weights, slice(start, stop)),
            functools.partial(encode, chosen=slice(start, stop)),
            columns_first=True,
        )
        for start, stop in itertools.pairwise(bounds.tolist())
    ]
    before = range(-(axis.offsets[-1] // axis.stride), 0)
    behind = range(axis.outputs, (axis.size - 1 - axis.offsets[0]) // axis.stride + 1)
    return (*views, *_border_views(axis, before), *_border_views(axis, behind))


def spectral_period(axis: Axis) -> int:
    """Length of the padded row that is transformed: even, and no two taps meet around it."""
    lags = axis.offsets[-1] // axis.stride - axis.offsets[0] // axis.stride
    period = -(-axis.size // axis.stride) + lags
    return period + period % 2


def _border_views(axis: Axis, surplus: Iterable[int]) -> list[RowEncoding]:
    """The view that subtracts output positions which do not exist, if they see anything."""
    seen = [
        axis.stride * position + offset
        for position in surplus
        for offset in axis.offsets
        if 0 <= axis.stride * position + offset < axis.size
    ]
    if not seen:
        return []
    start, stop = min(seen), max(seen) + 1

    def weights() -> np.ndarray:
        return -_count_positions(axis, surplus, start, stop - start)

    def encode(images: tf.Tensor) -> tf.Tensor:
        rows, _, groups, channels = images.shape[1:]
        border = tf.transpose(images[:, :, start:stop], (3, 1, 0, 2, 4))
        return tf.reshape(border, (1, groups, rows, -1, (stop - start) * channels))

    return [RowEncoding(1, stop - start, 1, weights, encode)]


def _count_positions(axis: Axis, positions: Iterable[int], start: int, width: int) -> np.ndarray:
    """How often given output positions see columns d and d' of a window through taps j and j'.

    Returns:
        `(kw * kw, width * width)`.
    """
    counts = np.zeros((axis.taps, axis.taps, width, width))
    for position in positions:
        columns = np.array(axis.offsets) + axis.stride * position - start
        taps = np.flatnonzero((columns >= 0) & (columns < width))
        for j, k in itertools.product(taps, repeat=2):
            counts[j, k, columns[j], columns[k]] += 1
    return counts.reshape(axis.taps**2, -1)


def pad(tensor: tf.Tensor, paddings: Sequence[tuple[int, int]]) -> tf.Tensor:
    """`tf.pad`, without the copy where there is nothing to pad."""
    return tf.pad(tensor, paddings) if any(map(any, paddings)) else tensor
