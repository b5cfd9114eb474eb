"""The step that minimises a quadratic model of the loss, momentum included: no learning rate.

With the preconditioned gradient `d = F̂⁻¹ g` and the last step `p`, the step is `-α d + μ p`. The
quadratic model of a batch's loss uses the exact Fisher matrix F of the whole network, and damping:

    M(δ) = g·δ + ½ δ·(F + Λ) δ

Over two directions it has two unknowns, and its minimum is the solution of a system of two
equations (Martens & Grosse 2015, sections 6.4 and 7).

A single batch's model is sure of the batch's gradient, noise included. What is noise follows from
Polyak's ratio (`keras_kfc.steps.polyak`): a gradient without it promises `g·d = 2 G` with the gap
`G` of the loss. So a step takes the share `n = 2 c s G / p̄` of it, all of it where that is more
than 1, and α and μ go from those of the model to Polyak's as the share goes to zero:

    α ← n (1 - (1 - n) μ₀) (n α + (1 - n) / 2)
    μ ← n μ + (1 - n) μ₀                            μ₀: the momentum that was given
"""

import dataclasses
from typing import Any

import tensorflow as tf

from keras_kfc.steps.api import QuadraticModel, StepQuery
from keras_kfc.steps.polyak import PolyakSteps

# Below this part of their product's root, two directions count as one.
_ALIKE = 1e-4
_MOST_MOMENTUM = 0.95


@dataclasses.dataclass(frozen=True)
class Minimum:
    """Where a quadratic model is lowest.

    Args:
        rate: `α`, a float32 scalar.
        momentum: `μ`, likewise.
    """

    rate: tf.Tensor
    momentum: tf.Tensor


def minimum(model: QuadraticModel) -> Minimum:
    """The lowest point of a model, with `μ` in [0, 0.95] and `α` at least 0.

    Args:
        model: The model.
    """
    along, across, before = model.curvature[0, 0], model.curvature[0, 1], model.curvature[1, 1]
    down, onward = model.slopes[0], model.slopes[1]
    determinant = along * before - tf.square(across)
    apart = determinant > _ALIKE * along * before
    momentum = tf.math.divide_no_nan(across * down - along * onward, determinant)
    momentum = tf.clip_by_value(tf.where(apart, momentum, 0.0), 0.0, _MOST_MOMENTUM)
    # The best rates for this momentum, which may have been at a bound, and without any.
    with_it, alone = (
        tf.clip_by_value(tf.math.divide_no_nan(slope, along), 0.0, model.longest)
        for slope in (down + momentum * across, down)
    )
    better = model.change(with_it, momentum) <= model.change(alone, tf.zeros_like(momentum))
    return Minimum(tf.where(better, with_it, alone), tf.where(better, momentum, 0.0))


class QuadraticSteps:
    """The rule; where there is no model of a batch it is Polyak's.

    All blocks have the same rate, so that the model foretells what the whole step does. Their
    direction has been shortened so that no layer moves by more than the learning rate.

    Args:
        polyak: Polyak's rule, which tells the share of noise.
    """

    def __init__(self, polyak: PolyakSteps):
        self._polyak = polyak

    def share(self, query: StepQuery) -> tf.Tensor:
        """Part of the best step to take, a scalar; moves what Polyak's rule remembers."""
        sizes = self._polyak.sizes(query)
        # Twice Polyak's step without momentum: `2 c s G / p̄`.
        without_noise = tf.reduce_max(2 * sizes.polyak / (1 - query.momentum))
        return tf.where(sizes.early, 1.0, tf.minimum(1.0, without_noise))

    def rates(self, query: StepQuery) -> tf.Tensor:
        """`α_b` of all blocks, `(variables,)`."""
        if query.model is None:
            return self._polyak.rates(query)
        return query.model.share * self.longest(query)

    def momentum(self, query: StepQuery) -> Any:
        """`μ` of the model, or what was given so far as gradients are noise."""
        if query.model is None:
            return self._polyak.momentum(query)
        share = query.model.share
        return share * minimum(query.model).momentum + (1 - share) * query.momentum

    def longest(self, query: StepQuery) -> tf.Tensor:
        """The rate of a step that takes all of its share, `(variables,)`."""
        if query.model is None:
            return self._polyak.longest(query)
        share = query.model.share
        # All noise: Polyak's step, which `share` is twice of, but for momentum. No noise: `α`.
        rate = share * minimum(query.model).rate + (1 - share) / 2
        return tf.fill(tf.shape(query.squares), (1 - (1 - share) * query.momentum) * rate)
