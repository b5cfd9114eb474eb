"""The rule for variables without a Kronecker block: Adam without a scale of its own.

Batch-norm scales, embeddings and layers that are not instrumented are trained
by it. It differs from Adam in epsilon, which is relative to the root mean
square of the variable's own second moments, so that a constant factor on the
loss changes nothing. Source: Kingma & Ba (2015), algorithm 1.
"""

import math

import tensorflow as tf

BETA_1 = 0.9
BETA_2 = 0.999
EPSILON = 1e-5


def bias_corrections(step: tf.Tensor) -> tuple[tf.Tensor, ...]:
    """What the moving averages have to be divided by after a number of steps.

    Args:
        step: Number of the step, counted from 1, a scalar.

    Returns:
        Those of the first and the second moments, float32 scalars.
    """
    step = tf.cast(step, tf.float32)
    # 1 - beta^step, without the digits that the difference would lose.
    return tuple(-tf.math.expm1(step * math.log(beta)) for beta in (BETA_1, BETA_2))


def adam_step(
    gradient: tf.Tensor,
    first: tf.Tensor,
    second: tf.Tensor,
    corrections: tuple[tf.Tensor, ...],
    learning_rate: tf.Tensor,
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """One step of the fallback rule.

    Args:
        gradient: Gradient of the loss.
        first: Moving average of gradients.
        second: Moving average of squared gradients.
        corrections: `bias_corrections` of this step.
        learning_rate: Learning rate of the rule, a scalar.

    Returns:
        `(update, first, second)`: what to add to the variable, and the new
        moving averages; each of the shape of `gradient`.
    """
    first_correction, second_correction = (tf.cast(c, gradient.dtype) for c in corrections)
    learning_rate = tf.cast(learning_rate, gradient.dtype)
    first = BETA_1 * first + (1 - BETA_1) * gradient
    second = BETA_2 * second + (1 - BETA_2) * tf.square(gradient)
    deviation = tf.sqrt(second / second_correction)
    typical = tf.sqrt(tf.reduce_mean(tf.square(deviation)))
    step = tf.math.divide_no_nan(first / first_correction, deviation + EPSILON * typical)
    return -learning_rate * step, first, second
