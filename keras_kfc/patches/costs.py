"""Which way of summing second moments of patches is the cheapest.

An estimate of time on a CPU from static sizes: products at the speed that
matrices of their width reach, copies, the price of starting an operation, and a share of what
it takes to trace and optimise the graph, which is done once in a training.
The constants were fitted to `python -m benchmarks.patches` and to times of traces; only ratios
matter.
On other hardware the same forms are exact, if not always the fastest.
"""

import functools
from collections.abc import Iterator

from keras_kfc._compat.tensorflow_internals import products_are_exact
from keras_kfc.patches.geometry import Axis, row_plan
from keras_kfc.patches.row_views import RowEncoding, spectral_period, spectral_views, window_views

# Time is counted in products of a large matrix multiplication, for each example of a batch of
# usual size.
_BATCH = 32
_COPY = 100.0  # reading and writing one number
_START = 5e6 / _BATCH  # starting one operation
_VIEW = 1.5e8 / _BATCH  # making the graph of a view, spread over fifty updates
_WEIGHING = 400.0 / _BATCH  # reordering and weighing one number of a Gram matrix
_HALF_SPEED_WIDTH = 64  # matrices of this width are multiplied at half of the full speed
# Limits beyond which a view is not considered.
_WIDEST = 1536  # columns times channels
_LONGEST = 1024  # columns of a row that is transformed
_MOST_WEIGHTS = 2**23  # weights of its Gram matrices


def cheapest_views(
    rows: Axis, columns: Axis, groups: int, channels: int, form: str | None = None
) -> tuple[RowEncoding, ...] | None:
    """Views for `autocorrelation.second_moment`, or None where patches are cheaper.

    Args:
        rows: Axis of the images' height.
        columns: Axis of their width.
        groups: Number of channel groups.
        channels: Channels of a group.
        form: `"spectral"` or `"windows"` to choose among these views only.
    """
    if form is None and not products_are_exact():
        # Differences of rounded sums have no precision left, and would not be
        # positive semi-definite. Products of rounded patches are.
        return None
    return _cheapest(rows, columns, groups, channels, form)


@functools.lru_cache(maxsize=512)
def _cheapest(
    rows: Axis, columns: Axis, groups: int, channels: int, form: str | None
) -> tuple[RowEncoding, ...] | None:
    def candidates() -> Iterator[tuple[RowEncoding, ...]]:
        if form != "windows" and spectral_period(columns) <= _LONGEST:
            yield spectral_views(columns, _parts(rows, columns))
        if form != "spectral":
            for outputs in range(1, max(1, min(columns.outputs, 32)) + 1):
                yield window_views(columns, outputs)

    def sizable(views: tuple[RowEncoding, ...]) -> bool:
        return all(
            view.planes * (view.columns * columns.taps) ** 2 <= _MOST_WEIGHTS
            and (form is not None or view.columns * channels <= _WIDEST)
            for view in views
        )

    found = [views for views in candidates() if sizable(views)]
    best = min(found, key=lambda views: cost(rows, columns, groups, channels, views), default=None)
    if best is None and form is not None:
        raise ValueError(
            f"Argument `form` cannot be {form!r} for a kernel this wide. Received: "
            f"{columns.taps} taps"
        )
    if form is None and best is not None:
        patches = _im2col_cost(rows, columns, groups, channels)
        return best if cost(rows, columns, groups, channels, best) < patches else None
    return best


def _im2col_cost(rows: Axis, columns: Axis, groups: int, channels: int) -> float:
    """Estimated time for one example with patches laid out."""
    width = rows.taps * columns.taps * channels
    numbers = rows.outputs * columns.outputs * groups * width
    copies = 0 if rows.taps == columns.taps == 1 else 2 * _COPY
    return numbers * (width + _HALF_SPEED_WIDTH + copies) + 2 * _START + _VIEW


def _parts(rows: Axis, columns: Axis) -> int:
    """In how many parts to do the spectral view, so that it stays small beside patches.

    The images in another order and, twice, their spectra are held at a time; that
    should be at most a quarter of the patches.
    """
    patches = rows.taps * columns.taps * rows.outputs * columns.outputs
    pixels = rows.size * columns.size
    spectra = 2 * spectral_period(columns) * columns.stride / columns.size
    for parts in range(1, 4):
        if pixels * (1 + spectra / parts) < patches / 4:
            return parts
    return 4


def cost(
    rows: Axis, columns: Axis, groups: int, channels: int, views: tuple[RowEncoding, ...]
) -> float:
    """Estimated time for one example of a batch.

    Args:
        rows: Axis of the images' height.
        columns: Axis of their width.
        groups: Number of channel groups.
        channels: Channels of a group.
        views: The views to use.
    """
    plan = row_plan(rows)
    all_rows = -(-rows.size // rows.stride)
    row_products = sum(all_rows if part.row is None else 1 for part in plan.sums)
    operations = sum(part.row is None for part in plan.sums) + 1
    total = 0.0
    for view in views:
        width = view.columns * channels
        vectors = view.planes * groups * view.repeats
        slowdown = 1 + _HALF_SPEED_WIDTH / width
        total += row_products * vectors * width**2 * slowdown
        total += 2 * _COPY * rows.size * vectors * width
        total += _START * operations + _VIEW
        total += _WEIGHING * len(plan.sums) * view.planes * groups * width**2
        if view.planes > 1:  # the transform
            pixels = rows.size * columns.size * groups * channels
            total += pixels * (2 * view.planes + _COPY)
    return total


def working_set_size(
    rows: Axis, columns: Axis, groups: int, channels: int, views: tuple[RowEncoding, ...]
) -> int:
    """How many numbers are held at a time for one example, about.

    Args:
        rows: Axis of the images' height.
        columns: Axis of their width.
        groups: Number of channel groups.
        channels: Channels of a group.
        views: The views to use.
    """
    # The images in another order, and a view before and after its own reordering.
    widest = max(view.planes * view.repeats * view.columns for view in views)
    return rows.size * groups * channels * (columns.size + 2 * widest)
