"""Damping that follows from how well the quadratic model foretells the loss.

The reduction ratio `ρ` is the change of a batch's loss by a step over the change that the quadratic
model foretold. Where it is above 3/4 the model is good and damping falls, where it is below 1/4
damping rises (Levenberg 1944, Marquardt 1963; Martens & Grosse 2015, section 6.5). Both
changes are averaged over several steps, so that single small batches do not decide.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

# Steps between two looks at the ratio, and how many steps each look is taken at the start.
PERIOD, FIRST_STEPS = 5, 20
# What damping is multiplied by or divided by for each step.
_OMEGA = 19 / 20
_DECAY = 0.8
# Changes of a loss of less than so many of its roundings do not count.
_ROUNDINGS = 30.0
_GOOD, _BAD = 0.75, 0.25
# Damping is in units of mean eigenvalues.
_LEAST, _MOST = 1e-3, 10.0
# Where gradients are noise steps are short, and short steps are foretold well whatever damping is.
_OF_NOISE = 0.15


class LevenbergMarquardt:
    """The rule of damping, with what it remembers.

    Args:
        held: The variable that holds `λ`, which the optimizer's `damping` reads.
        add_variable: Makes a variable of the optimizer.
        relative: Whether damping is in units of the mean eigenvalue of each block.

    Attributes:
        reduction_ratio: `ρ` of now, averaged.
    """

    def __init__(self, held: Any, add_variable: Callable[..., Any], relative: bool):
        self._held, self.relative = held, relative
        self._ratio = add_variable((), dtype="float32", name="reduction_ratio")
        self._weight = add_variable((), dtype="float32", name="reduction_ratio_weight")

    def damping(self) -> tf.Tensor:
        """`λ` of now."""
        return tf.cast(tf.convert_to_tensor(self._held), tf.float32)

    def reduction_ratio(self) -> tf.Tensor:
        """`ρ`, averaged, a float32 scalar; 0 before the first look."""
        return tf.math.divide_no_nan(self._ratio.value, self._weight.value)

    def judge(
        self, before: tf.Tensor, after: tf.Tensor, foretold: tf.Tensor, share: tf.Tensor
    ) -> tf.Tensor:
        """Takes in what a step did to the loss of its batch.

        Args:
            before: The loss before the step, a scalar.
            after: The loss after it.
            foretold: The change that the model foretold, negative.
            share: Part of the model's step that was taken, less than 1 where gradients are noise.

        Returns:
            Whether the step is to stay: not one after which the loss is higher, or not finite.
        """
        change = tf.cast(after - before, tf.float32)
        finite = tf.math.is_finite(change) & tf.math.is_finite(foretold)
        # A change that the loss's own rounding hides says nothing.
        rounding = float(np.finfo(before.dtype.as_numpy_dtype).eps)
        smallest = _ROUNDINGS * rounding * tf.cast(tf.abs(before), tf.float32)
        visible = ~finite | (tf.maximum(tf.abs(change), tf.abs(foretold)) > smallest)
        # A step as bad as it was meant to be good says all that there is to say.
        now = tf.clip_by_value(tf.math.divide_no_nan(change, foretold), -1.0, 2.0)
        now = tf.where(finite, now, -1.0)
        part = tf.where(visible, 1 - _DECAY, 0.0)
        for average, value in ((self._ratio, now), (self._weight, 1.0)):
            average.assign_add(part * (value - average.value))
        ratio = self.reduction_ratio()
        factor = tf.where(ratio > _GOOD, _OMEGA**PERIOD, 1.0)
        factor = tf.where(ratio < _BAD, _OMEGA**-PERIOD, factor)
        factor = tf.where(visible, factor, 1.0)
        low, high = 0.0, float("inf")
        if self.relative:
            low, high = tf.maximum(_LEAST, _OF_NOISE * (1 - share)), _MOST
        self._held.assign(tf.clip_by_value(self.damping() * factor, low, high))
        return finite & ((change <= 0) | ~visible)
