"""The rule for variables without a Kronecker block: Adam without a scale of its own.

Batch-norm scales, embeddings and layers that are not instrumented are trained
by it. It differs from Adam in epsilon, which is relative to the root mean
square of the variable's own second moments, so that a constant factor on the
loss changes nothing. Source: Kingma & Ba (2015), algorithm 1.
"""

import tensorflow as tf

BETA_1 = 0.9
BETA_2 = 0.999
EPSILON = 1e-5


def adam_step(
    gradient: tf.Tensor,
    first: tf.Tensor,
    second: tf.Tensor,
    step: tf.Tensor,
    learning_rate: tf.Tensor,
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """One step of the fallback rule.

    Args:
        gradient: Gradient of the loss.
        first: Moving average of gradients.
        second: Moving average of squared gradients.
        step: Number of this step, counted from 1, a scalar.
        learning_rate: Learning rate of the rule, a scalar.

    Returns:
        `(update, first, second)`: what to add to the variable, and the new
        moving averages; each of the shape of `gradient`.
    """
    step = tf.cast(step, gradient.dtype)
    learning_rate = tf.cast(learning_rate, gradient.dtype)
    first = BETA_1 * first + (1 - BETA_1) * gradient
    second = BETA_2 * second + (1 - BETA_2) * tf.square(gradient)
    mean = first / (1 - tf.pow(tf.cast(BETA_1, gradient.dtype), step))
    deviation = tf.sqrt(second / (1 - tf.pow(tf.cast(BETA_2, gradient.dtype), step)))
    typical = tf.sqrt(tf.reduce_mean(tf.square(deviation)))
    update = -learning_rate * tf.math.divide_no_nan(mean, deviation + EPSILON * typical)
    return update, first, second
