"""A bound on the Fisher norm of all steps together."""

from typing import Any

import tensorflow as tf

from keras_kfc.steps.api import StepQuery, StepRule
from keras_kfc.steps.loss_trend import Progress


class TrustRegion:
    """Keeps another rule's steps within `α² g · F⁻¹ g ≤ ν`.

    The step's length in the metric of the Fisher matrix is twice the Kullback-Leibler divergence
    that it makes, to second order (Grosse & Martens 2016, section 4).

    Args:
        rule: The rule.
        bound: `ν`, a part of the loss above its lowest value, or a number.
        relative: Whether it is a part of the loss.
        progress: The losses seen so far. Before any loss has been seen the unit is 1.
    """

    def __init__(self, rule: StepRule, bound: float, relative: bool, progress: Progress):
        self._rule, self._bound, self._relative = rule, bound, relative
        self._progress = progress

    def rates(self, query: StepQuery) -> tf.Tensor:
        """The rule's rates, or the bound where that is less, `(variables,)`."""
        unit = tf.where(self._progress.seen, tf.abs(self._progress.excess.value), 1.0)
        bound = self._bound * (unit if self._relative else 1.0)
        squared = tf.maximum(query.clipped_slope, 0.0)
        within = tf.sqrt(tf.math.divide_no_nan(bound, squared))
        return tf.minimum(self._rule.rates(query), within)

    def momentum(self, query: StepQuery) -> Any:
        """What the rule says."""
        return self._rule.momentum(query)

    def longest(self, query: StepQuery) -> tf.Tensor:
        """What the rule allows."""
        return self._rule.longest(query)
