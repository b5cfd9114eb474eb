"""What a rule of the step size is asked, and what it answers.

A rule gives each block a rate `α_b`; the block's step is `-α_b d_b`, with `d = F⁻¹ g`. Blocks go by
the index of their kernel among the trainable variables; at all other indices nothing counts.
"""

import dataclasses
from typing import Any, Protocol

import tensorflow as tf


@dataclasses.dataclass(frozen=True)
class QuadraticModel:
    """A quadratic model of a batch's loss over two directions, for steps `-α d + μ p`.

    Args:
        curvature: `d·C d`, `d·C p` and `p·C p`, `(2, 2)`, float32, with `C` the exact Fisher
            matrix and damping, d the direction and p the last step.
        slopes: `g·d` and `g·p`, `(2,)`, float32.
        longest: The largest `α` that is allowed, a float32 scalar.
        share: Part of the best `α` that a step takes, likewise; less than 1 where gradients are
            noise.
    """

    curvature: tf.Tensor
    slopes: tf.Tensor
    longest: tf.Tensor
    share: tf.Tensor

    def change(self, rates: tf.Tensor, momentum: tf.Tensor) -> tf.Tensor:
        """What the model says that a step changes the loss by, a scalar.

        Args:
            rates: `α`, a scalar.
            momentum: `μ`.
        """
        step = tf.stack([-rates, momentum])
        quadratic = tf.reduce_sum(step * tf.linalg.matvec(self.curvature, step))
        return tf.reduce_sum(step * self.slopes) + quadratic / 2


@dataclasses.dataclass(frozen=True)
class StepQuery:
    """What is known of a step before its size.

    Args:
        learning_rate: `η`, a float32 scalar.
        momentum: `μ`.
        scale: `c`, what a rule's steps are multiplied by, a float32 scalar.
        slope: `g · F⁻¹ g` of the gradient as it was before it was clipped, over all blocks but
            tables of rows that are looked up, a float32 scalar.
        table_slope: The same over these tables.
        clipped_slope: The same over all blocks, of the gradient that the step is along.
        squares: Mean square of each block's direction, `(variables,)`, float32.
        tables: Which blocks are such tables, `(variables,)`, booleans.
        model: A quadratic model of the batch's loss, or None.
    """

    learning_rate: tf.Tensor
    momentum: float
    scale: tf.Tensor
    slope: tf.Tensor
    table_slope: tf.Tensor
    clipped_slope: tf.Tensor
    squares: tf.Tensor
    tables: tf.Tensor
    model: QuadraticModel | None = None


class StepRule(Protocol):
    """A rule of the step size, with what it remembers."""

    def rates(self, query: StepQuery) -> tf.Tensor:
        """`α_b` of all blocks, `(variables,)`; moves what is remembered, once for each step."""

    def momentum(self, query: StepQuery) -> Any:
        """`μ` of the step, a number or a scalar; asked before `rates`, and changes nothing."""

    def longest(self, query: StepQuery) -> tf.Tensor:
        """The largest rates that the rule allows, `(variables,)`."""


class DampingRule(Protocol):
    """Says what is added to the curvature before it is inverted."""

    @property
    def relative(self) -> bool:
        """Whether it is in units of the mean eigenvalue of each block, or absolute."""

    def damping(self) -> tf.Tensor:
        """`λ` of now, a float32 scalar, at least 0; changes nothing."""
