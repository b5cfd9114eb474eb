"""Factors of weights that an example uses at many positions, as if at one.

`keras_kfc.maps.api` takes positions to be uncorrelated, as the paper does: the setting that
Eschenhagen et al. (2023, "Kronecker-factored approximate curvature for modern neural network
architectures") call *expand*. In the other, *reduce*, an example's derivative `Σ_t ā_t Ds_tᵀ` is
taken for that of the mean input and the sum of the derivatives, which is exact where one of them is
the same at all positions:

    omega  mean over examples of  ā āᵀ,    ā the mean over positions
    gamma  mean over examples of  d dᵀ,    d the sum over positions of Ds

The third setting, *trace*, takes positions for what they are (`keras_kfc.maps.partial_traces`).
"""

from collections.abc import Sequence

import tensorflow as tf

from keras_kfc.linalg.products import gram
from keras_kfc.maps.api import LinearMap, masked, pad_and_split_columns

WEIGHT_SHARING = ("expand", "reduce", "trace")


def reduced_input_factor(
    linear_map: LinearMap,
    inputs: Sequence[tf.Tensor],
    batch_size: tf.Tensor,
    use_bias: bool,
    parts: int,
    masks: Sequence[tf.Tensor | None],
) -> tf.Tensor:
    """Omega of one batch in the reduce setting, `(G * parts, n, n)`.

    Arguments are those of `keras_kfc.maps.api.input_factor`. The positions of an example are
    those of all uses together.
    """
    totals, counts = [], []
    for tensor, mask in zip(inputs, masks, strict=True):
        rows = linear_map.input_rows(masked(tensor, mask))
        weights = _weights(mask, rows)
        totals.append(tf.reduce_sum(by_example(rows, batch_size), axis=2))
        counts.append(tf.reduce_sum(by_example(weights, batch_size), axis=2))
    means = tf.math.divide_no_nan(tf.add_n(totals), tf.add_n(counts))
    means = split_channels(linear_map, means, parts)
    if use_bias:
        first = tf.constant([1.0] + [0.0] * (parts - 1), means.dtype)
        ones = tf.tile(first, [linear_map.groups])[:, None, None] * tf.ones_like(means[..., :1])
        means = tf.concat((means, ones), axis=2)
    return gram(means) / tf.cast(batch_size, means.dtype)


def reduced_output_factor(
    linear_map: LinearMap,
    derivatives: Sequence[tf.Tensor],
    batch_size: tf.Tensor,
    parts: int,
    masks: Sequence[tf.Tensor | None],
) -> tf.Tensor:
    """Gamma of one batch in the reduce setting, `(G * parts, m, m)`.

    Arguments are those of `keras_kfc.maps.api.output_factor`, and the number of examples.
    """
    parts_of_sum = []
    for tensor, mask in zip(derivatives, masks, strict=True):
        rows = linear_map.derivative_rows(masked(tensor, mask))
        parts_of_sum.append(tf.reduce_sum(by_example(rows, batch_size), axis=2))
    sums = tf.add_n(parts_of_sum)
    return gram(pad_and_split_columns(sums, parts)) / tf.cast(batch_size, sums.dtype)


def by_example(rows: tf.Tensor, batch_size: tf.Tensor) -> tf.Tensor:
    """`(G, N, n)` as `(G, B, positions, n)`; each row by itself if N is no multiple of B."""
    count = tf.cast(tf.round(tf.cast(batch_size, tf.float32)), tf.int32)
    count = tf.maximum(count, 1)
    number = tf.shape(rows)[1]
    count = tf.where(number % count == 0, count, number)
    positions = number // tf.maximum(count, 1)
    return tf.reshape(rows, (rows.shape[0], count, positions, rows.shape[2]))


def _weights(mask: tf.Tensor | None, rows: tf.Tensor) -> tf.Tensor:
    """Whether each row counts, `(1, N, 1)`; an entry of a mask may stand for several rows."""
    if mask is None:
        return tf.ones_like(rows[:1, :, :1])
    weights = tf.reshape(tf.cast(mask, rows.dtype), (-1,))
    repeats = tf.shape(rows)[1] // tf.maximum(tf.size(weights), 1)
    return tf.reshape(tf.repeat(weights, repeats), (1, -1, 1))


def split_channels(linear_map: LinearMap, rows: tf.Tensor, parts: int) -> tf.Tensor:
    """Cuts the channels of rows into parts, as `LinearMap.input_moments` does."""
    if parts == 1:
        return rows
    channels = linear_map.inputs // linear_map.groups
    taps = linear_map.kernel_rows // channels
    groups, width = linear_map.groups, -(-channels // parts)
    rows = tf.reshape(rows, (groups, -1, taps, channels))
    rows = tf.pad(rows, ((0, 0), (0, 0), (0, 0), (0, width * parts - channels)))
    rows = tf.reshape(rows, (groups, -1, taps, parts, width))
    return tf.reshape(tf.transpose(rows, (0, 3, 1, 2, 4)), (groups * parts, -1, taps * width))
