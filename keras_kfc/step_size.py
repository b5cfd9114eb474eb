"""How far to go along the preconditioned gradient: one length for all layers, and a bound for each.

With `d = F⁻¹ g` per block, `p = g·d` over all blocks, `μ` the momentum, `c` the scale of
the rule and `η` the learning rate, a block's step is `-α_b d_b`, where

    r    = p / G                                  G: the gap, see `keras_kfc.progress`
    r̄    = average of r                           over about 20 steps
    s    = η / (highest η so far)                 what a schedule has taken off
    α    = c s (1 - μ) / max(r̄, r / 4)            Polyak's step: c G is what it takes off the loss
    α_b  = min(α, η (1 - μ) / rms(d_b))           no weight moves further than Adam's would

Why each part is there stands in `docs/method.md`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from keras_kfc.progress import Progress
from keras_kfc.tune import TUNE

_RATIO_DECAY = TUNE.get("ratio_decay", 0.95)
_SURPRISE = TUNE.get("surprise", 4.0)
_LENGTH_DECAY = TUNE.get("length_decay", 0.95)
_JUMP = TUNE.get("jump", 4.0)
# Part of the bound that a step takes where nothing is known of the loss.
_BLIND = TUNE.get("blind", 0.2)
# Part of it where the lowest loss is not known.
_UNKNOWN = TUNE.get("unknown", 0.33)
_FIRST_STEPS = TUNE.get("first", 20)


class StepSize:
    """The rule, with what it remembers.

    Args:
        add_variable: Makes a variable of the optimizer.
    """

    def __init__(self, add_variable: Callable[..., Any]):
        self._ratio = add_variable((), dtype="float32", name="slope_over_gap")
        self._ratio_weight = add_variable((), dtype="float32", name="slope_over_gap_weight")
        self._highest_rate = add_variable((), dtype="float32", name="highest_learning_rate")

    def build(self, add_variable: Callable[..., Any], blocks: int) -> None:
        """Makes what depends on the number of blocks."""
        self._lengths = add_variable((blocks,), dtype="float32", name="squared_length")
        self._lengths_weight = add_variable((), dtype="float32", name="squared_length_weight")

    def rates(
        self,
        progress: Progress,
        learning_rate: tf.Tensor,
        momentum: float,
        scale: tf.Tensor,
        slope: tf.Tensor,
        squared: Sequence[tf.Tensor],
    ) -> tf.Tensor:
        """Factors of the directions of all blocks, `(blocks,)`; moves what is remembered.

        Args:
            progress: The losses seen so far.
            learning_rate: `η`.
            momentum: `μ`.
            scale: `c`.
            slope: `p`, a scalar.
            squared: Mean square of each block's direction, scalars.
        """
        self._highest_rate.assign(tf.maximum(self._highest_rate, learning_rate))
        schedule = tf.math.divide_no_nan(learning_rate, self._highest_rate.value)
        schedule = schedule ** TUNE.get("schedule", 1.0)
        known = progress.lowest_known > 0
        gap = progress.gap()
        ratio = tf.math.divide_no_nan(tf.maximum(slope, 0.0), gap)
        seen = tf.cast(gap > 0, tf.float32)
        weight = tf.where(gap > 0, _RATIO_DECAY, 1.0) * self._ratio_weight + seen * (
            1 - _RATIO_DECAY
        )
        self._ratio.assign_add(
            seen * tf.math.divide_no_nan(1 - _RATIO_DECAY, weight) * (ratio - self._ratio)
        )
        self._ratio_weight.assign(weight)
        average = self._ratio.value
        if _SURPRISE:
            average = tf.maximum(average, ratio / _SURPRISE)
        polyak = tf.where(
            gap > 0, scale * schedule * (1 - momentum) * tf.math.divide_no_nan(1.0, average), 0.0
        )
        squares = tf.stack([tf.cast(part, tf.float32) for part in squared])
        weight = _LENGTH_DECAY * self._lengths_weight + (1 - _LENGTH_DECAY)
        self._lengths.assign_add((1 - _LENGTH_DECAY) / weight * (squares - self._lengths))
        self._lengths_weight.assign(weight)
        lengths = self._lengths.value
        if _JUMP:
            lengths = tf.maximum(lengths, squares / _JUMP**2)
        else:
            lengths = squares
        bound = learning_rate * (1 - momentum) * tf.math.divide_no_nan(1.0, tf.sqrt(lengths))
        early = ~known & (progress.steps_seen <= _FIRST_STEPS)
        blind = early | ~progress.seen
        bounded = tf.minimum(polyak, bound * tf.where(known, 1.0, _UNKNOWN))
        self.used = tf.where(blind, 1.0, tf.reduce_mean(bounded / bound))
        return tf.where(blind, scale * _BLIND * bound, bounded)
