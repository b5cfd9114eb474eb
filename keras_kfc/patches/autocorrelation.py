"""Exact second moments of convolution patches without the patches.

The second moment of the patches of an image has an entry for each two taps δ, δ'
and channels, `Σ_t a[t + δ] a[t + δ']ᵀ`. Pairs of taps at equal distance sum the
same products but for some at the border, so that there is far less to compute than
patches laid out in a matrix would need, and no such matrix to hold.

Rows are summed as `keras_kfc.patches.geometry.row_plan` tells: a sum for each
distance of tap rows, and a few border rows. Columns are left to the views of
`keras_kfc.patches.row_views`, whose Gram matrices give all pairs of tap columns at once.

Shapes: as in `keras_kfc.patches.row_views`; K = kh * kw * J.
"""

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from keras_kfc.patches.geometry import Axis, RowPlan, RowSum, row_plan
from keras_kfc.patches.row_views import RowEncoding, pad

# How many bytes of Gram matrices are weighed at a time.
_GRAM_BYTES = 2**24


def second_moment(
    images: tf.Tensor, rows: Axis, columns: Axis, views: Sequence[RowEncoding]
) -> tf.Tensor:
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
            laid_out = [view.encode(source) for source in sources]
        phase_rows = [_Rows(part) for part in laid_out]
        gram_bytes = 4 * view.planes * groups * (view.columns * channels) ** 2
        for batch in _batches(plan.sums, max(1, _GRAM_BYTES // gram_bytes)):
            grams = _join([_grams(phase_rows, wanted) for wanted in batch])
            column_sums = _column_sums(grams, view, columns.taps, groups, channels)
            parts = tf.unstack(column_sums)
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


def _phases(images: tf.Tensor, axis: Axis) -> list[tf.Tensor]:
    """Rows 0, s, 2s, ..., rows 1, s + 1, ... and so on, each `(B, rows, W, G, J)`."""
    stride = axis.stride
    if stride == 1:
        return [images]
    count = -(-axis.size // stride)
    images = pad(images, ((0, 0), (0, stride * count - axis.size), *[(0, 0)] * 3))
    return tf.unstack(tf.reshape(images, (-1, count, stride, *images.shape[2:])), axis=2)


class _Rows:
    """Rows of one phase as a view lays them out, with what products of them share.

    The first step of a training traces every sum here, so that operations count. Hence
    shapes are constants that are made once, and `tf.slice` takes the place of brackets.

    Args:
        laid_out: `(P, G, H, N, V)`, V = D * J. The Z = P * G planes are kept as one axis,
            if there are several: one matrix is multiplied faster than a batch of one.
    """

    def __init__(self, laid_out: tf.Tensor):
        planes, self.groups, self.rows, _, width = laid_out.shape
        self.planes = planes * self.groups
        shape = (self.rows, -1, width)
        self.values = tf.reshape(laid_out, shape if self.planes == 1 else (self.planes, *shape))
        self._matrix_shape = tf.constant((-1, width))

    @functools.cached_property
    def together(self) -> tf.Tensor:
        """All rows of each plane as one matrix, `(Z, H * N, V)`, or `(H * N, V)` if Z is 1."""
        if self.planes == 1:
            return self.as_matrix(self.values)
        return tf.reshape(self.values, (self.planes, -1, self.values.shape[-1]))

    @functools.cached_property
    def all_but_last_plane(self) -> tf.Tensor:
        """The same without the last plane, `(Z - 1, H * N, V)`."""
        return tf.slice(self.together, (0, 0, 0), (self.planes - 1, -1, -1))

    @functools.cached_property
    def _in_a_row(self) -> tf.Tensor:
        return tf.reshape(self.values, (self.planes * self.rows, -1, self.values.shape[-1]))

    def as_matrix(self, values: tf.Tensor) -> tf.Tensor:
        """Joins all axes but the last."""
        return tf.reshape(values, self._matrix_shape)

    def shifted(self, shift: int, shape: tf.Tensor) -> tf.Tensor:
        """All rows but the first few, and as many of the next plane, `(Z - 1, H * N, V)`.

        For one group only; see `_shifted_gram`.

        Args:
            shift: How many.
            shape: `(Z - 1, -1, V)`, which others share.
        """
        count = (self.planes - 1) * self.rows
        return tf.reshape(tf.slice(self._in_a_row, (shift, 0, 0), (count, -1, -1)), shape)

    def part(self, plane: int, row: int, size: tf.Tensor) -> tf.Tensor:
        """From a plane and a row on, `(planes, rows, N, V)` as `size` makes it."""
        begin = (row, 0, 0) if self.planes == 1 else (plane, row, 0, 0)
        return tf.slice(self.values, begin, size)

    def size(self, planes: int, rows: int) -> tf.Tensor:
        """The size of a part, to be shared by several."""
        return tf.constant((rows, -1, -1) if self.planes == 1 else (planes, rows, -1, -1))

    def pick(self, rows: Sequence[int]) -> tf.Tensor:
        """Single rows, `(Z, n, N, V)` without the axes of length 1."""
        return tf.gather(
            self.values, rows if len(rows) > 1 else rows[0], axis=self.values.shape.rank - 3
        )


def _grams(phase_rows: Sequence[_Rows], wanted: Sequence[Any]) -> tf.Tensor:
    """Gram matrices for one sum over all rows or several over one row, `(..., V, V)`.

    The leading axes hold `(n, P, G)`, whatever their number. `wanted` holds a `RowSum` for each.
    """
    first, second = phase_rows[wanted[0].phase], phase_rows[wanted[0].other_phase]
    if wanted[0].row is None:
        return _shifted_gram(first, second, wanted[0].shift)
    grams = _product(
        first.pick([part.row for part in wanted]),
        second.pick([part.row + part.shift for part in wanted]),
    )
    return tf.transpose(grams, (1, 0, 2, 3)) if grams.shape.rank == 4 else grams


def _shifted_gram(first: _Rows, second: _Rows, shift: int) -> tf.Tensor:
    """Sum over rows q of `first[q]ᵀ second[q + shift]`, `(Z * V, V)` or `(Z, V, V)`."""
    if shift == 0:
        return _product(first.together, second.together)
    rows, others = first.rows - shift, first.planes - 1
    if first.groups > 1:
        # Each group's sum is to be exact to its own scale, so that nothing of another may be in it.
        size = first.size(first.planes, rows)
        shape = tf.constant((first.planes, -1, first.values.shape[-1]))
        return _product(
            tf.reshape(first.part(0, 0, size), shape),
            tf.reshape(second.part(0, shift, size), shape),
        )
    # Slices of the leading axis are no copies. So all planes are shifted as one, and the
    # products of rows from two planes subtracted. The last plane has none behind it.
    size = first.size(1, rows)
    last = _product(
        first.as_matrix(first.part(others, 0, size)),
        second.as_matrix(second.part(others, shift, size)),
    )
    if not others:
        return last
    size, shape = first.size(others, shift), tf.constant((others, -1, last.shape[-1]))
    across = _product(
        tf.reshape(first.part(0, rows, size), shape), tf.reshape(second.part(1, 0, size), shape)
    )
    grams = _product(first.all_but_last_plane, second.shifted(shift, shape)) - across
    return tf.concat((first.as_matrix(grams), last), axis=0)


def _product(first: tf.Tensor, second: tf.Tensor) -> tf.Tensor:
    """`firstᵀ second`, over the last axis but one."""
    return tf.matmul(first, second, transpose_a=True)


def _join(grams: Sequence[tf.Tensor]) -> tf.Tensor:
    """Joins Gram matrices along the first of all leading axes."""
    if len(grams) == 1:
        return grams[0]
    shape = tf.constant((-1, grams[0].shape[-1]))
    return tf.concat(
        [gram if gram.shape.rank == 2 else tf.reshape(gram, shape) for gram in grams], axis=0
    )


def _column_sums(
    grams: tf.Tensor, view: RowEncoding, taps: int, groups: int, channels: int
) -> tf.Tensor:
    """Weighs Gram matrices, S times `(P, G, D * J, D * J)`, into sums `(S, G, kw * J, kw * J)`."""
    planes, columns = view.planes, view.columns
    grams = tf.reshape(grams, (-1, planes, groups, columns, channels, columns, channels))
    grams = tf.transpose(grams, (0, 2, 1, 3, 5, 4, 6))
    count = grams.shape[0]
    grams = tf.reshape(grams, (count, groups, planes * columns**2, channels**2))
    sums = tf.constant(view.weights(), grams.dtype) @ grams
    sums = tf.reshape(sums, (count, groups, taps, taps, channels, channels))
    sums = tf.transpose(sums, (0, 1, 2, 4, 3, 5))
    return tf.reshape(sums, (count, groups, taps * channels, taps * channels))


def _assemble(sums: Sequence[tf.Tensor], plan: RowPlan, taps: int, zeros: tf.Tensor) -> tf.Tensor:
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
