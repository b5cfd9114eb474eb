"""Where the taps of a convolution fall along one axis of its input.

Pure arithmetic on static sizes, no tensors. An output position t sees, through
tap i, input position `stride * t + offsets[i]`, or a zero of the padding where
that lies outside of `[0, size)`. Everything a second moment of patches needs
follows from this one sentence, axis by axis.
"""

import dataclasses
import functools
import itertools


@dataclasses.dataclass(frozen=True)
class Axis:
    """One spatial axis of a convolution.

    Args:
        size: Number of input positions, those behind the last that is seen left out.
        outputs: Number of output positions.
        stride: Stride of the convolution.
        offsets: For each tap, the input position that output 0 sees through
            it; ascending, negative in the padding.
    """

    size: int
    outputs: int
    stride: int
    offsets: tuple[int, ...]

    @property
    def taps(self) -> int:
        """Number of taps of the kernel."""
        return len(self.offsets)

    def seen(self, first: int, second: int) -> range:
        """Input positions seen through a tap while a second, not before it, sees the input."""
        stride = self.stride
        low = max(0, -(self.offsets[first] // stride))
        high = min(self.outputs, (self.size - 1 - self.offsets[second]) // stride + 1)
        start = stride * low + self.offsets[first]
        return range(start, start + stride * max(0, high - low), stride)


def axis_of(size: int, kernel: int, stride: int, padding: str, dilation: int) -> Axis:
    """The axis of a convolution as Keras defines it.

    Args:
        size: Number of input positions.
        kernel: Number of taps.
        stride: Stride.
        padding: `"valid"` or `"same"`.
        dilation: Distance of neighbouring taps.
    """
    extent = dilation * (kernel - 1) + 1
    if padding == "same":
        outputs = -(-size // stride)
        before = max((outputs - 1) * stride + extent - size, 0) // 2
    else:
        outputs = max(0, (size - extent) // stride + 1)
        before = 0
    offsets = tuple(dilation * tap - before for tap in range(kernel))
    return Axis(min(size, stride * (outputs - 1) + offsets[-1] + 1), outputs, stride, offsets)


@dataclasses.dataclass(frozen=True)
class RowSum:
    """A sum of products of rows with rows at some distance, `Σ_q row(q) row(q + shift)ᵀ`.

    Rows are counted within their phase: row q of phase r is input row `stride * q + r`.

    Args:
        phase: Phase of the first row of each product.
        other_phase: Phase of the second.
        shift: Distance of the two, each counted within its phase.
        row: The one row q to take, or None for all that have a partner.
    """

    phase: int
    other_phase: int
    shift: int
    row: int | None = None


@dataclasses.dataclass(frozen=True)
class RowPlan:
    """How the sums for all pairs of tap rows come out of few distinct ones.

    Args:
        sums: The sums to compute.
        pairs: For each pair of taps `(i, i')`, `i <= i'`, that ever see the
            input together: `(number of a sum, sign)` for each of its terms.
    """

    sums: tuple[RowSum, ...]
    pairs: dict[tuple[int, int], tuple[tuple[int, int], ...]]


@functools.lru_cache(maxsize=256)
def row_plan(axis: Axis) -> RowPlan:
    """Plans the row sums of a convolution's second moment.

    Pairs of taps at equal distance see almost the same pairs of rows: all that
    have that distance, but for a few at the border. So each pair's sum is one
    over all rows, which it shares with others, less a few border rows; or, where
    most rows would have to be taken away, the sum of the few that are left.

    Args:
        axis: The axis that rows are counted along.
    """
    numbers: dict[RowSum, int] = {}
    pairs = {}
    for taps in itertools.combinations_with_replacement(range(axis.taps), 2):
        seen = axis.seen(*taps)
        if not seen:
            continue
        first_row, phase = divmod(seen.start, axis.stride)
        distance = axis.offsets[taps[1]] - axis.offsets[taps[0]]
        shift, other_phase = divmod(phase + distance, axis.stride)
        # All rows q for which the second row, stride * q + phase + distance, is in the input.
        partnered = -(-(axis.size - phase - distance) // axis.stride)
        inside = range(first_row, first_row + len(seen))
        wanted = RowSum(phase, other_phase, shift)
        if 2 * len(inside) < partnered:
            terms = [(dataclasses.replace(wanted, row=row), 1) for row in inside]
        else:
            border = [row for row in range(partnered) if row not in inside]
            terms = [(wanted, 1), *((dataclasses.replace(wanted, row=row), -1) for row in border)]
        pairs[taps] = tuple((numbers.setdefault(part, len(numbers)), sign) for part, sign in terms)
    return RowPlan(tuple(numbers), pairs)
