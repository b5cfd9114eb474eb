"""How far training has got and how fast it goes on, from the losses of its batches.

Polyak's rule takes the lowest loss for within reach, and asks for steps in proportion to what
the loss `L` has above it, its excess `E`. Where it is not within reach (noisy targets,
a net that is too small), noise from such steps keeps the loss up for good; where it is
within reach and the net fits ever more of the data, larger steps would do. How fast
the excess falls tells these cases apart. Learning curves are about straight lines on
logarithmic axes, `E ∝ t^-P` after t steps, so the exponent `P` is compared with an
ordinary one:

    E of now        decays by 0.9 for each step
    E_r, E_p        means weighted by t^9 and by t: over recent steps and past ones
    P = log(E_p / E_r) / 0.4
    pace = w + (1 - w) 3 P,     w = min(1, 100 / t)

A constant loss gives a pace of 100 / t, as the theory of stochastic approximation has it.
"""

from collections.abc import Callable
from typing import Any

import tensorflow as tf

_DECAY = 0.9
# Weights t^(k-1), for k the strength; means of t^-P are t^-P k / (k - P).
_RECENT, _PAST = 10.0, 2.0
_ORDINARY_EXPONENT = 1 / 3
_FASTEST = 10.0
# Steps in which the first fall of the loss says little of what will follow.
_START = 100.0


class Progress:
    """What an optimizer remembers of the losses it has seen.

    Args:
        add_variable: Makes a variable of the optimizer.

    Attributes:
        excess: The excess of now, or 0 before any loss.
        lowest_known: Whether it was measured from the lowest loss, 0 or 1.
    """

    def __init__(self, add_variable: Callable[..., Any]):
        self._seen = add_variable((), dtype="int64", name="losses_seen")
        self.excess = add_variable((), dtype="float32", name="excess_loss")
        self._recent = add_variable((), dtype="float32", name="recent_excess_loss")
        self._past = add_variable((), dtype="float32", name="past_excess_loss")
        self.lowest_known = add_variable((), dtype="int64", name="lowest_loss_known")

    def observe(self, excess: tf.Tensor, lowest_known: tf.Tensor) -> None:
        """Takes in the loss of a batch; one that is not finite counts for nothing.

        Args:
            excess: The loss above its lowest value, or the loss where that is not known.
            lowest_known: Whether it is known.
        """
        finite = tf.math.is_finite(excess)
        excess = tf.where(finite, tf.abs(excess), 0.0)
        self._seen.assign_add(tf.cast(finite, tf.int64))
        count = tf.cast(tf.maximum(self._seen.value, 1), tf.float32)
        # The first rate is 1: no average needs a correction for its start.
        for average, rate in (
            (self.excess, (1 - _DECAY) / (1 - _DECAY**count)),
            (self._recent, tf.minimum(1.0, _RECENT / count)),
            (self._past, tf.minimum(1.0, _PAST / count)),
        ):
            average.assign_add(tf.where(finite, rate, 0.0) * (excess - average))
        self.lowest_known.assign(tf.cast(lowest_known, tf.int64))

    def forget(self) -> None:
        """Back to before any loss."""
        for variable in (self._seen, self.excess, self._recent, self._past, self.lowest_known):
            variable.assign(tf.zeros_like(variable.value))

    @property
    def seen(self) -> tf.Tensor:
        """Whether any loss has been seen, a boolean scalar."""
        return self._seen > 0

    @property
    def measured_from_lowest(self) -> tf.Tensor:
        """Whether a loss has been seen and its lowest value is known, a boolean scalar."""
        return self.seen & (self.lowest_known > 0)

    def pace(self) -> tf.Tensor:
        """Factor for Polyak's step: 1 at first and where the excess falls as usual."""
        tiny = tf.constant(1e-30)
        past, recent = tf.maximum(self._past.value, tiny), tf.maximum(self._recent.value, tiny)
        exponent = tf.math.log(past / recent) / (1 / _PAST - 1 / _RECENT)
        # A loss that rises tells of other data, or of steps that are too large.
        relative = tf.abs(exponent) / _ORDINARY_EXPONENT
        relative = tf.minimum(relative, tf.where(exponent > 0, _FASTEST, 1.0))
        count = tf.cast(tf.maximum(self._seen.value, 1), tf.float32)
        start = tf.minimum(1.0, _START / count)
        return start + (1 - start) * relative
