"""How far training has got and how fast it goes on, from the losses of its batches.

Polyak's rule asks for steps in proportion to what the loss has above the lowest value within reach,
the gap. Two things tell of it:

* `E`, what the loss `L` has above the lowest value `L₀` that the targets allow, where that is
  known (`keras_kfc.losses.lowest`);
* the fall of the loss, whatever its offset and its sign. Learning curves are about straight
  lines on logarithmic axes, `L - L_∞ ∝ t^-P` after t examples; with an ordinary `P` of a third,
  the gap follows from how much the mean over recent steps is below that over past ones.

Where `L₀` is out of reach (noisy targets, a net that is too small), steps in proportion to `E`
would keep the loss up for good, and where the net fits ever more of the data, larger ones
would do. So after the start `E` is multiplied by how fast it falls, compared with an ordinary fall:

    _r, _p     means of `E` or `L` weighted by t^9 and by t: over recent steps and past ones
    P          log(E_p / E_r) / 0.4
    trend      w + (1 - w) 3 P,     w = min(1, 100 / steps)
    G          E trend                                                 where L₀ is known
               max((L_p - L_r) / 0.166, w 0.3 spread)                  where it is not

All averages weigh batches by their examples. A constant loss has a trend factor of 100 / steps, as
the theory of stochastic approximation has it.
"""

from collections.abc import Callable
from typing import Any

import tensorflow as tf

# The average of now forgets within ten steps, or so many examples if that is more.
_DECAY, _FEWEST_EXAMPLES = 0.9, 32.0
# Weights t^(k-1), for k the strength; means of t^-P are t^-P k / (k - P).
_RECENT, _PAST = 10.0, 2.0
_REFERENCE_EXPONENT = 1 / 3
# E_p - E_r for E of now at the ordinary exponent.
_REFERENCE_FALL = _PAST / (_PAST - _REFERENCE_EXPONENT) - _RECENT / (_RECENT - _REFERENCE_EXPONENT)
_FASTEST = 10.0
# Steps in which the first fall of the loss says little of what will follow.
_START = 100.0
# Part of the spread of batches' losses that the gap is taken for at least, at the start.
_PART_OF_SPREAD = 0.3


class Progress:
    """What an optimizer remembers of the losses it has seen.

    Args:
        add_variable: Makes a variable of the optimizer.

    Attributes:
        excess: `E` of now, or the loss of now where `L₀` is not known; 0 before any loss.
        lowest_known: Whether `L₀` was known, 0 or 1.
    """

    def __init__(self, add_variable: Callable[..., Any]):
        self._seen = add_variable((), dtype="int64", name="losses_seen")
        self._examples = add_variable((), dtype="float32", name="loss_examples")
        self.excess = add_variable((), dtype="float32", name="excess_loss")
        self._excess_weight = add_variable((), dtype="float32", name="excess_loss_weight")
        self._spread = add_variable((), dtype="float32", name="loss_spread")
        self._recent = add_variable((), dtype="float32", name="recent_excess_loss")
        self._past = add_variable((), dtype="float32", name="past_excess_loss")
        self._part = add_variable((), dtype="float32", name="partial_loss")
        self._part_examples = add_variable((), dtype="float32", name="partial_loss_examples")
        self.lowest_known = add_variable((), dtype="int64", name="lowest_loss_known")

    def observe(
        self,
        excess: tf.Tensor,
        lowest_known: tf.Tensor,
        examples: tf.Tensor | float = 1.0,
        complete: tf.Tensor | None = None,
    ) -> None:
        """Takes in the loss of a batch; one that is not finite counts for nothing.

        Args:
            excess: The loss above its lowest value, or the loss where that is not known, a scalar.
            lowest_known: Whether it is known.
            examples: Number of examples in the batch.
            complete: Whether the batch is the last of several whose gradients are averaged, and
                which count as one; None where each is a batch of its own.
        """
        usable = tf.math.is_finite(excess)
        excess = tf.where(usable, excess, 0.0)
        count = tf.where(usable, tf.cast(examples, tf.float32), 0.0)
        if complete is not None:
            excess, count = self._joined(excess, count, complete)
        self._seen.assign_add(tf.cast(count > 0, tf.int64))
        examples = self._examples + count
        share = tf.math.divide_no_nan(count, examples)
        decay = tf.maximum(_DECAY, 1 - count / _FEWEST_EXAMPLES)
        weight = tf.where(count > 0, decay, 1.0) * self._excess_weight + count
        # Before the averages move, so that the first loss is not its own mean.
        rate = tf.math.divide_no_nan(count, weight)
        deviation = tf.abs(excess - tf.where(self._examples > 0, self.excess.value, excess))
        for average, value, part in (
            (self.excess, excess, rate),
            (self._spread, deviation, rate),
            # The weight of this batch among all, for weights that grow with examples seen.
            (self._recent, excess, 1 - (1 - share) ** _RECENT),
            (self._past, excess, 1 - (1 - share) ** _PAST),
        ):
            average.assign_add(part * (value - average))
        self._excess_weight.assign(weight)
        self._examples.assign(examples)
        self.lowest_known.assign(tf.cast(lowest_known, tf.int64))

    def _joined(
        self, excess: tf.Tensor, count: tf.Tensor, complete: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Mean and number of examples of all parts of a batch; 0 examples until it is complete."""
        together = self._part_examples + count
        mean = self._part + tf.math.divide_no_nan(count, together) * (excess - self._part)
        self._part.assign(tf.where(complete, 0.0, mean))
        self._part_examples.assign(tf.where(complete, 0.0, together))
        return mean, tf.where(complete, together, 0.0)

    def forget(self) -> None:
        """Back to before any loss."""
        for variable in (
            self._seen,
            self._examples,
            self.excess,
            self._excess_weight,
            self._spread,
            self._recent,
            self._past,
            self._part,
            self._part_examples,
            self.lowest_known,
        ):
            variable.assign(tf.zeros_like(variable.value))

    @property
    def seen(self) -> tf.Tensor:
        """Whether any loss has been seen, a boolean scalar."""
        return self._seen > 0

    @property
    def measured_from_lowest(self) -> tf.Tensor:
        """Whether a loss has been seen and its lowest value is known, a boolean scalar."""
        return self.seen & (self.lowest_known > 0)

    @property
    def steps_seen(self) -> tf.Tensor:
        """Number of losses seen, an int64 scalar."""
        return self._seen.value

    def start(self) -> tf.Tensor:
        """`w`: 1 in the first steps, 0 in the end."""
        return tf.minimum(1.0, _START / tf.cast(tf.maximum(self._seen.value, 1), tf.float32))

    def trend_factor(self) -> tf.Tensor:
        """Factor for Polyak's step: 1 at first and where the excess falls as usual."""
        tiny = tf.constant(1e-30)
        past, recent = tf.maximum(self._past.value, tiny), tf.maximum(self._recent.value, tiny)
        exponent = tf.math.log(past / recent) / (1 / _PAST - 1 / _RECENT)
        # A loss that rises tells of other data, or of steps that are too large.
        relative = tf.abs(exponent) / _REFERENCE_EXPONENT
        relative = tf.minimum(relative, tf.where(exponent > 0, _FASTEST, 1.0))
        start = self.start()
        return start + (1 - start) * relative

    def gap(self) -> tf.Tensor:
        """What the loss may still fall by, a float32 scalar; 0 where nothing tells of it."""
        fall = (self._past - self._recent) / _REFERENCE_FALL
        by_fall = tf.maximum(fall, _PART_OF_SPREAD * self.start() * self._spread)
        return tf.where(self.lowest_known > 0, tf.abs(self.excess) * self.trend_factor(), by_fall)

    def noise_share(self, slope: tf.Tensor) -> tf.Tensor:
        """Share of noise in the gradient, in [0, 1], where the lowest loss is known.

        A quadratic loss without noise has `g · F⁻¹ g = 2 (L - L₀)`.

        Args:
            slope: `g · F⁻¹ g` of the gradient as it was before clipping, a scalar.
        """
        # By rounding, a loss may be below its lowest value.
        without = tf.math.divide_no_nan(2 * tf.abs(self.excess.value), tf.maximum(slope, 0.0))
        return 1 - tf.minimum(1.0, without)
