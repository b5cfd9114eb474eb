"""How far to go along the preconditioned gradient: one length for all layers, and a bound for each.

With `d = F⁻¹ g` per block, `p = g·d` over many blocks, `μ` the momentum, `c` the scale of
the rule and `η` the learning rate, a block's step is `-α_b d_b`, where

    r    = p / G                            p: of all tables, or of all other blocks
                                            G: the gap, see `keras_kfc.steps.loss_trend`
    r̄    = average of r                     over about 20 steps
    s    = η / (highest η so far)           what a schedule has taken off
    α    = c s (1 - μ) / r̄                  Polyak's step: c G is what it takes off the loss
    α_b  = min(α, b η (1 - μ) / rms(d_b))   no layer moves further than Adam would

Tables of rows that are looked up have a ratio `r̄` of their own. A batch sees few of their rows, so
most of what these promise is noise, which in a sum over all would shorten the steps of all.

`b` is 1 where the lowest loss is known, and `_UNKNOWN` where it is not. There, in the first steps,
and where the loss is never seen, `α_b` is `_BLIND` times the bound, with the same average, and yet
within the bound.

Momentum is of steps as long as those of now: when `r̄` moves, what earlier gradients have left in it
moves as well, `μ` times `r̄` of before over that of after. Without that, the long steps of the start
go on for `1 / (1 - μ)` steps when the loss has fallen, and make a net too sure of itself. After
the start, when `r̄` mostly moves by the noise of batches, it is that ratio to the power of
`w = min(1, 100 / steps)`. Why each part is there stands in `docs/method.md`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from keras_kfc.steps.api import StepQuery
from keras_kfc.steps.loss_trend import Progress

# Of the averages of the ratio and of the lengths of directions. At the start they forget faster:
# a mean of values weighted by their number to the power of _START - 1.
_DECAY, _START = 0.95, 5.0
# Part of the bound where the lowest loss is not known, so that the gap is a guess.
_UNKNOWN = 0.33
# Part of the bound that a step takes where nothing is known of the loss.
_BLIND = 0.2
# Steps after which the fall of a loss tells of its gap.
_FIRST_STEPS = 20
# How much further than with momentum of one length a layer may be carried while steps get longer.
_FURTHER = 1.8


@dataclasses.dataclass(frozen=True)
class PolyakSizes:
    """What the rule says of a step.

    Args:
        rates: `α_b` of all blocks, `(variables,)`.
        polyak: The same without a bound, `α`, a scalar or for each block.
        early: Whether nothing is known of the loss yet, a boolean scalar.
    """

    rates: tf.Tensor
    polyak: tf.Tensor
    early: tf.Tensor


class PolyakSteps:
    """The rule, with what it remembers.

    Args:
        add_variable: Makes a variable of the optimizer.
        progress: The losses seen so far.
    """

    def __init__(self, add_variable: Callable[..., Any], progress: Progress):
        self._progress = progress
        self._ratio = add_variable((), dtype="float32", name="slope_over_gap")
        self._ratio_count = add_variable((), dtype="float32", name="slope_over_gap_count")
        self._highest_rate = add_variable((), dtype="float32", name="highest_learning_rate")

    def build(self, add_variable: Callable[..., Any], variables: int, tables: bool) -> None:
        """Makes what there is for each block; a block goes by the index of its kernel.

        Args:
            add_variable: Makes a variable of the optimizer.
            variables: Number of trainable variables.
            tables: Whether one of them is a table.
        """
        self._squares = add_variable((variables,), dtype="float32", name="squared_length")
        self._squares_count = add_variable((), dtype="float32", name="squared_length_count")
        self._of_tables: tuple[Any, Any] | None = None
        if tables:
            self._of_tables = (
                add_variable((), dtype="float32", name="slope_over_gap_of_tables"),
                add_variable((), dtype="float32", name="slope_over_gap_of_tables_count"),
            )

    def rates(self, query: StepQuery) -> tf.Tensor:
        """Rates of all blocks, `(variables,)`; moves what is remembered."""
        return self.sizes(query).rates

    def momentum(self, query: StepQuery) -> tf.Tensor:
        """What the optimizer was given, times what this batch makes steps longer or shorter by."""
        ratio = tf.math.divide_no_nan(query.slope, self._progress.gap())
        change = self._ratio / _moved(self._ratio, self._ratio_count, ratio)
        # A gradient that promises nothing says nothing of how long steps should be.
        known = (self._ratio_count > 0) & tf.math.is_finite(ratio) & (ratio > 0) & ~self._early()
        change = tf.where(known & (change > 0), change, 1.0) ** self._progress.start()
        # At full precision for weights of any dtype.
        momentum = query.momentum * tf.cast(change, tf.float64)
        return tf.minimum(momentum, 1 - (1 - query.momentum) / _FURTHER)

    def _early(self) -> tf.Tensor:
        """Whether nothing is known of the loss yet, a boolean scalar."""
        unknown = self._progress.lowest_known == 0
        early = unknown & (self._progress.steps_seen <= _FIRST_STEPS)
        return early | ~self._progress.seen

    def sizes(self, query: StepQuery) -> PolyakSizes:
        """Rates of all blocks, and what they come from; moves what is remembered."""
        learning_rate, progress = query.learning_rate, self._progress
        self._highest_rate.assign(tf.maximum(self._highest_rate, learning_rate))
        scale = query.scale * tf.math.divide_no_nan(learning_rate, self._highest_rate.value)
        gap = progress.gap()
        # Averages of before this batch: a step that depended on its size would be biased.
        ratio = _ratio(self._ratio, self._ratio_count, query.slope, gap)
        if self._of_tables is not None:
            of_tables = _ratio(*self._of_tables, query.table_slope, gap)
            ratio = tf.where(query.tables, of_tables, ratio)
        usual = _average(self._squares, self._squares_count, query.squares, tf.constant(True))
        longest = learning_rate * (1 - query.momentum)
        polyak = (1 - query.momentum) * tf.math.divide_no_nan(scale, ratio)
        known = progress.lowest_known > 0
        early = self._early()
        bound = tf.math.divide_no_nan(longest, tf.sqrt(query.squares))
        blind = _BLIND * scale * tf.math.divide_no_nan(longest, tf.sqrt(usual))
        within = tf.minimum(polyak, tf.where(known, 1.0, _UNKNOWN) * bound)
        return PolyakSizes(tf.where(early, tf.minimum(blind, bound), within), polyak, early)

    def longest(self, query: StepQuery) -> tf.Tensor:
        """The bound, `η (1 - μ) / rms(d_b)`, `(variables,)`."""
        bound = query.learning_rate * (1 - query.momentum)
        return tf.math.divide_no_nan(bound, tf.sqrt(query.squares))


def _ratio(average: Any, count: Any, slope: tf.Tensor, gap: tf.Tensor) -> tf.Tensor:
    """Takes `p / G` of a batch into its average, and returns that of before."""
    ratio = tf.math.divide_no_nan(tf.maximum(slope, 0.0), gap)
    return _average(average, count, ratio, gap > 0)


def _average(average: Any, count: Any, value: tf.Tensor, usable: tf.Tensor) -> tf.Tensor:
    """Moves an average if a value is usable, and returns what it was before, or the first value."""
    usable &= tf.reduce_all(tf.math.is_finite(value))
    before = tf.where(count > 0, average.value, value)
    average.assign(tf.where(usable, _moved(average, count, value), average.value))
    count.assign_add(tf.cast(usable, tf.float32))
    return before


def _moved(average: Any, count: Any, value: tf.Tensor) -> tf.Tensor:
    """What an average becomes with one more value."""
    rate = tf.maximum(1 - _DECAY, _START / (count + _START))
    return average + rate * (value - average)
