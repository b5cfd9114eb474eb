"""How one variable changes in a step, given its direction and rate: with a block, and without."""

import functools
from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from keras_kfc.optimizer.adam import adam_step
from keras_kfc.optimizer.rows import SummedRows
from keras_kfc.optimizer.settings import Settings


class Moves:
    """Moves momenta, and tells the changes of variables; for one step, or one trace of it.

    Of a variable of which a batch used some rows, only these and their momenta are moved.

    Args:
        settings: The optimizer.
        momentums: A variable for each trainable variable: its momentum, or the average of
            its gradients where there is no block.
        second_moments: Likewise, the averages of squares; None where there is a block.
        momentum: `μ` of this step, a number or a scalar.
        nesterov: Whether it is Nesterov's.
    """

    def __init__(
        self,
        settings: Settings,
        momentums: Sequence[Any],
        second_moments: Sequence[Any],
        momentum: Any,
        nesterov: bool,
    ):
        self._settings, self._nesterov = settings, nesterov
        self._momentums, self._second_moments = momentums, second_moments
        # One constant for all variables.
        self._momentum = functools.cache(lambda dtype: _number(momentum, dtype))

    def with_block(
        self,
        index: int,
        variable: Any,
        factor: tf.Tensor,
        direction: tf.Tensor,
        rows: SummedRows | None,
        moving_rows: tf.Tensor | None,
    ) -> tf.Tensor:
        """The change of a variable with a block, or of some of its rows.

        Args:
            index: Its index.
            variable: The variable.
            factor: What its direction is multiplied by.
            direction: Its preconditioned gradient, or that of the rows, `(N, ...)`.
            rows: The rows, or None.
            moving_rows: Which rows are moved, booleans, or None for all.
        """
        step = tf.cast(tf.cast(factor, direction.dtype) * direction, variable.dtype)
        before = _values(self._momentums[index], rows)
        momentum = self._momentum(variable.dtype)
        velocity = momentum * before + step
        change = momentum * velocity + step if self._nesterov else velocity
        if moving_rows is not None:
            velocity = tf.where(moving_rows[:, None], velocity, before)
            change = tf.where(moving_rows[:, None], change, tf.zeros_like(change))
        self._store(self._momentums[index], velocity, rows)
        return change

    def without_block(
        self,
        index: int,
        variable: Any,
        gradient: tf.Tensor,
        corrections: tuple[tf.Tensor, ...],
        learning_rate: tf.Tensor,
        rows: SummedRows | None,
    ) -> tf.Tensor:
        """The change of any other variable by the fallback rule, or of some of its rows.

        Args:
            index: Its index.
            variable: The variable.
            gradient: Its gradient, or that of the rows, `(N, ...)`.
            corrections: `bias_corrections` of this step.
            learning_rate: Learning rate of the fallback rule.
            rows: The rows, or None.
        """
        moments = (self._momentums[index], self._second_moments[index])
        values = [_values(moment, rows) for moment in moments]
        gradient = tf.cast(gradient, variable.dtype)
        change, *moved = adam_step(gradient, values[0], values[1], corrections, learning_rate)
        for moment, new in zip(moments, moved, strict=True):
            self._store(moment, new, rows)
        return change

    def _store(self, variable: Any, values: tf.Tensor, rows: SummedRows | None) -> None:
        if rows is not None:
            values = tf.IndexedSlices(values, rows.indices)
        self._settings.assign(variable, values)


def _number(value: Any, dtype: tf.DType) -> tf.Tensor:
    """A number or a scalar in some dtype, at full precision."""
    return tf.cast(value, dtype) if tf.is_tensor(value) else tf.constant(value, dtype)


def _values(variable: Any, rows: SummedRows | None) -> tf.Tensor:
    return variable.value if rows is None else rows.rows_of(variable)
