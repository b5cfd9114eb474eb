"""When factors and inverses are due."""

from typing import Any

import tensorflow as tf


def is_update_step(step: Any, period: int, factor_period: int, turn: int = 0) -> tf.Tensor:
    """Whether something with a period is due, a boolean scalar.

    Curvature changes fast at the start. Old inverses then let steps through that
    are far too long, and what these do to the weights is not undone soon.
    So what has a period is due in each of the first 8 steps, in every second of the
    next 8, in every fourth of the next 16, and so on, up to the period.

    Args:
        step: Number of steps taken, a scalar.
        period: The period, in steps.
        factor_period: That of the factors; see `growing_periods`.
        turn: In which step of each period, once nothing is due more often than that.
    """
    step = tf.cast(step, tf.int64)
    periods = tf.constant(growing_periods(period, factor_period), tf.int64)
    now = tf.reduce_max(tf.where(step >= 4 * periods, periods, 1))
    own = tf.constant(turn % period, tf.int64)
    return tf.equal(step % now, tf.where(tf.equal(now, period), own, 0))


def growing_periods(period: int, factor_period: int) -> list[int]:
    """Steps between updates as training goes on: 1, 2, 4, ... up to the period.

    Beyond the period of the factors, they are multiples of it, so that inverses are those
    of new factors.
    """
    periods = [1]
    while 2 * periods[-1] < min(period, factor_period):
        periods.append(2 * periods[-1])
    longer = max(factor_period, 2)
    while longer < period:
        periods.append(longer)
        longer *= 2
    return [*periods, period] if period > 1 else periods
