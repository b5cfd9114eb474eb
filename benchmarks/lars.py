"""LARS, what large batches are usually trained with, as a baseline."""

from typing import Any

import keras
from keras import ops


class LARS(keras.optimizers.SGD):
    """Layer-wise adaptive rate scaling (You, Gitman & Ginsburg 2017), section 4.

    Each matrix's gradient is scaled to `trust` times the norm of its weights; those of biases and
    scales stay as they are. Momentum comes after that.

    Args:
        learning_rate: Global rate.
        momentum: Momentum.
        trust: Part of the norm of a matrix that a step of rate 1 has, 0.001 in the paper.
        **kwargs: As of `keras.optimizers.SGD`.
    """

    def __init__(
        self, learning_rate: float = 1.0, momentum: float = 0.9, trust: float = 0.001, **kwargs: Any
    ):
        super().__init__(learning_rate, momentum, **kwargs)
        self.trust = trust

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        """Takes a step of SGD along the scaled gradient."""
        if len(variable.shape) > 1:
            weights, gradients = ops.norm(variable), ops.norm(gradient)
            known = ops.logical_and(weights > 0, gradients > 0)
            one = ops.ones_like(gradients)
            ratio = self.trust * weights / ops.where(known, gradients, one)
            gradient = gradient * ops.where(known, ratio, one)
        super().update_step(gradient, variable, learning_rate)
