"""Exact second moments of convolution patches without the patches.

The second moment of the patches of an image has an entry for each two taps δ, δ'
and channels, `Σ_t a[t + δ] a[t + δ']ᵀ`. Pairs of taps at equal distance sum the
same products but for some at the border, so that there is far less to compute than
patches laid out in a matrix would need, and no such matrix to hold.

Rows are summed as `keras_kfc.patch_geometry.row_plan` tells: a sum for each
distance of tap rows, and a few border rows. Columns are left to the views of
`keras_kfc.row_views`, whose Gram matrices give all pairs of tap columns at once.

Shapes: as in `keras_kfc.row_views`; K = kh * kw * J.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from keras_kfc.patch_geometry import Axis, RowSum, row_plan
from keras_kfc.row_views import View, pad

# How many bytes of Gram matrices are weighed at a time.
_GRAM_BYTES = 2**24


def second_moment(images: tf.Tensor, rows: Axis, columns: Axis, views: Sequence[View]) -> tf.Tensor:
    """Sums `p pᵀ` over all patches of a batch of images.

    Args:
        images: `(B, H, W, G, J)`.
        rows: The axis of H.
        columns: The axis of W.
        views: The views of `columns` to use.

    Returns:
        `(G, K, K)`, rows in the order (tap row, tap column, channel).
    """
    plan = row_plan(rows)
    groups, channels = images.shape[3:]
    phases = _phases(images[:, : rows.size, : columns.size], rows)
    columns_first = []
    if any(view.columns_first for view in views):
        columns_first = [tf.transpose(part, (2, 1, 0, 3, 4)) for part in phases]
    sums: dict[RowSum, tf.Tensor] = {}
    for view in views:
        # One view after the other, so that the memory of one can serve the next.
        with tf.control_dependencies(list(sums.values())):
            sources = columns_first if view.columns_first else phases
            laid_out = [view.lay_out(source) for source in sources]
        gram_bytes = 4 * view.planes * groups * (view.columns * channels) ** 2
        for batch in _batches(plan.sums, max(1, _GRAM_BYTES // gram_bytes)):
            grams = tf.concat([_grams(laid_out, wanted) for wanted in batch], axis=0)
            parts = tf.unstack(_column_sums(grams, view, columns.taps, channels))
            for wanted, part in zip(itertools.chain(*batch), parts, strict=True):
                sums[wanted] = sums[wanted] + part if wanted in sums else part
    zeros = tf.zeros((groups, columns.taps * channels, columns.taps * channels), images.dtype)
    return _assemble([sums[wanted] for wanted in plan.sums], plan, rows.taps, zeros)


def _batches(sums: Sequence[RowSum], size: int) -> list[list[tuple[RowSum, ...]]]:
    """Row sums, at most `size` at a time, with single rows of the same phases together."""
    together: dict[Any, list[RowSum]] = {}
    for wanted in sums:
        key = wanted if wanted.row is None else (wanted.phase, wanted.other_phase)
        together.setdefault(key, []).append(wanted)
    batches: list[list[tuple[RowSum, ...]]] = []
    held = size
    for members in together.values():
        for start in range(0, len(members), size):
            part = tuple(members[start : start + size])
            if held + len(part) > size:
                batches.append([])
                held = 0
            batches[-1].append(part)
            held += len(part)
    return batches


def _phases(images, axis):
    """Rows 0, s, 2s, ..., rows 1, s + 1, ... and so on, each `(B, rows, W, G, J)`."""
    stride = axis.stride
    if stride == 1:
        return [images]
    count = -(-axis.size // stride)
    images = pad(images, ((0, 0), (0, stride * count - axis.size), *[(0, 0)] * 3))
    return tf.unstack(tf.reshape(images, (-1, count, stride, *images.shape[2:])), axis=2)


def _grams(laid_out, wanted):
    """Gram matrices for one sum over all rows or several over one row, `(n, P, G, D J, D J)`."""
    first, second = laid_out[wanted[0].phase], laid_out[wanted[0].other_phase]
    if wanted[0].row is None:
        return _shifted_gram(first, second, wanted[0].shift)[None]
    first = tf.gather(first, [part.row for part in wanted], axis=2)
    second = tf.gather(second, [part.row + part.shift for part in wanted], axis=2)
    return tf.transpose(_product(first, second, 3), (2, 0, 1, 3, 4))


def _shifted_gram(first, second, shift):
    """Sum over rows q of `first[q]ᵀ second[q + shift]`, `(P, G, D * J, D * J)`."""
    if shift == 0:
        return _product(first, second, 2)
    planes, groups, rows, _, width = first.shape
    count = planes * groups
    first = tf.reshape(first, (count, rows, -1, width))
    second = tf.reshape(second, (count, rows, -1, width))
    # Slices of the leading axis are no copies. So all planes are shifted as one, and the
    # products of rows from two planes subtracted. The last plane has none behind it.
    grams = [_product(first[-1:, : rows - shift], second[-1:, shift:], 1)]
    if count > 1:
        flat = tf.reshape(second, (count * rows, -1, width))[shift : (count - 1) * rows + shift]
        flat = tf.reshape(flat, (count - 1, rows, -1, width))
        across = _product(first[:-1, rows - shift :], second[1:, :shift], 1)
        grams.insert(0, _product(first[:-1], flat, 1) - across)
    return tf.reshape(tf.concat(grams, axis=0), (planes, groups, width, width))


def _product(first, second, batch_axes):
    """`firstᵀ second`, all axes between the first few and the last taken as one."""
    batch, width = first.shape[:batch_axes], first.shape[-1]
    # One matrix is multiplied faster than a batch of one.
    shape = (-1, width) if batch.num_elements() == 1 else (*batch, -1, width)
    product = tf.matmul(tf.reshape(first, shape), tf.reshape(second, shape), transpose_a=True)
    return tf.reshape(product, (*batch, width, width))


def _column_sums(grams, view, taps, channels):
    """Weighs Gram matrices `(S, P, G, D * J, D * J)` into sums `(S, G, kw * J, kw * J)`."""
    count, planes, groups = grams.shape[:3]
    columns = view.columns
    grams = tf.reshape(grams, (count, planes, groups, columns, channels, columns, channels))
    grams = tf.transpose(grams, (0, 2, 1, 3, 5, 4, 6))
    grams = tf.reshape(grams, (count, groups, planes * columns**2, channels**2))
    sums = tf.constant(view.weights(), grams.dtype) @ grams
    sums = tf.reshape(sums, (count, groups, taps, taps, channels, channels))
    sums = tf.transpose(sums, (0, 1, 2, 4, 3, 5))
    return tf.reshape(sums, (count, groups, taps * channels, taps * channels))


def _assemble(sums, plan, taps, zeros):
    """Joins the sums for all pairs of tap rows to `(G, K, K)`."""
    known: dict[tuple[tuple[int, int], ...], tuple[tf.Tensor, tf.Tensor]] = {}
    blocks = [[zeros] * taps for _ in range(taps)]
    for (i, k), terms in plan.pairs.items():
        if terms not in known:
            added = tf.add_n([sums[number] for number, sign in terms if sign > 0])
            subtracted = [sums[number] for number, sign in terms if sign < 0]
            block = added - tf.add_n(subtracted) if subtracted else added
            known[terms] = block, tf.linalg.matrix_transpose(block)
        blocks[i][k], blocks[k][i] = known[terms] if i < k else known[terms][:1] * 2
    return tf.concat([tf.concat(row, axis=-1) for row in blocks], axis=-2)
