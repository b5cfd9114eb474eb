"""Which way of summing second moments of patches is the cheapest.

An estimate of time on a CPU from static sizes: products at the speed that
matrices of their width reach, copies, and the price of starting an operation.
The constants were fitted to `python -m benchmarks.patches`; only ratios matter.
On other hardware the same forms are exact, if not always the fastest.
"""

import functools
from collections.abc import Iterator

import tensorflow as tf

from keras_kfc.patch_geometry import Axis, row_plan
from keras_kfc.row_views import View, spectral_period, spectral_views, window_views, window_width

# Time is counted in products of a large matrix multiplication.
_COPY = 50.0  # reading and writing one number
_START = 5e6 / 128  # starting one operation, for each example of a batch of usual size
_HALF_SPEED_WIDTH = 32  # matrices of this width are multiplied at half of the full speed
_MAX_WINDOW = 1024  # columns times channels of a window, at most


def cheapest_views(
    rows: Axis, columns: Axis, groups: int, channels: int, form: str | None = None
) -> tuple[View, ...] | None:
    """Views for `keras_kfc.autocorrelation.second_moment`, or None where patches are cheaper.

    Args:
        rows: Axis of the images' height.
        columns: Axis of their width.
        groups: Number of channel groups.
        channels: Channels of a group.
        form: `"spectral"` or `"windows"` to choose among these views only.
    """
    if form is None and rows.taps == columns.taps == 1:
        return None
    exact_products = not (
        # Products rounded to ten bits would leave the transform without its precision.
        tf.config.list_logical_devices("GPU")
        and tf.config.experimental.tensor_float_32_execution_enabled()
    )
    return _cheapest(rows, columns, groups, channels, form, exact_products)


@functools.lru_cache(maxsize=512)
def _cheapest(rows, columns, groups, channels, form, exact_products):
    def candidates() -> Iterator[tuple[View, ...]]:
        if form == "spectral" or (form is None and exact_products):
            yield spectral_views(columns, _parts(rows, columns))
        if form != "spectral":
            widest = max(1, min(columns.outputs, 32))
            for outputs in range(1, widest + 1):
                wide = window_width(columns, outputs) * channels > _MAX_WINDOW
                if outputs == 1 or not wide:
                    yield window_views(columns, outputs)

    return min(candidates(), key=lambda views: cost(rows, columns, groups, channels, views))


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


def cost(rows: Axis, columns: Axis, groups: int, channels: int, views: tuple[View, ...]) -> float:
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
        total += _START * operations
        if view.planes > 1:  # the transform
            pixels = rows.size * columns.size * groups * channels
            total += pixels * (2 * view.planes + _COPY)
    return total


def numbers_held(
    rows: Axis, columns: Axis, groups: int, channels: int, views: tuple[View, ...]
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
