"""One step of the optimizer, given its curvature: directions, size, momentum, decay."""

from collections.abc import Mapping, Sequence
from typing import Any

import tensorflow as tf

from keras_kfc.curvature.api import Curvature
from keras_kfc.linalg.precision import all_finite
from keras_kfc.optimizer.adam import SummedRows, adam_step, bias_corrections, summed_rows
from keras_kfc.optimizer.settings import Settings
from keras_kfc.placement.current import current_placement
from keras_kfc.steps.api import StepQuery, StepRule
from keras_kfc.steps.loss_trend import Progress

# Weight decay of variables without a block, over that of kernels with one: with the default
# of 0.02, that of Keras's AdamW.
_PLAIN_DECAY = 0.2


class Update:
    """Turns gradients into changes of the variables.

    Args:
        settings: The optimizer.
        curvature: Its curvature.
        rule: Its rule of the step size.
        progress: The losses that it has seen.
        momentums: A variable for each trainable variable: its momentum, or the average of
            its gradients where there is no block.
        second_moments: Likewise, the averages of squares; None where there is a block.
    """

    def __init__(
        self,
        settings: Settings,
        curvature: Curvature,
        rule: StepRule,
        progress: Progress,
        momentums: Sequence[Any],
        second_moments: Sequence[Any],
    ):
        self._settings, self._curvature = settings, curvature
        self._rule, self._progress = rule, progress
        self._momentums, self._second_moments = momentums, second_moments

    def take(
        self,
        variables: Mapping[int, Any],
        gradients: Sequence[Any],
        clipped: Sequence[Any],
        learning_rate: tf.Tensor,
    ) -> None:
        """Takes one step; one whose gradients are not finite is counted and left out.

        Args:
            variables: The variables by index, in the order of the gradients.
            gradients: Their gradients on this replica, tensors or `tf.IndexedSlices`.
            clipped: The gradients to step along; `gradients` itself if nothing is clipped.
            learning_rate: A scalar.
        """
        settings = self._settings
        rows = self._rows_looked_up(variables, gradients) if clipped is gradients else {}
        summed = _summed(variables, clipped, rows)
        directions = self._curvature.natural_gradient(summed)
        quadratic = predicted_decrease = _inner_product(summed, directions)
        whole = summed if clipped is gradients else _summed(variables, gradients, rows)
        if clipped is not gradients and settings.polyak_scaling is not None and directions:
            # Clipping makes a step shorter. The smaller promise of a clipped gradient would
            # make it longer.
            predicted_decrease = _inner_product(whole, self._curvature.natural_gradient(whole))
            # Clipping is there for gradients whose squares overflow.
            predicted_decrease = tf.where(
                tf.math.is_finite(predicted_decrease), predicted_decrease, quadratic
            )
        # The fallback rule keeps squares, which may overflow where the gradient does not.
        values = {index: part.values for index, part in rows.items()}
        parts = {**summed, **values}
        squares = [tf.square(g) for i, g in parts.items() if i not in directions]
        # Clipping by value would hide an infinity.
        usable = all_finite([quadratic, *whole.values(), *values.values(), *squares])
        learning_rate = tf.cast(learning_rate, tf.float32)

        def update() -> bool:
            rates: dict[int, tf.Tensor] = {}
            share = tf.ones(())
            if directions:
                rates, share = self._rates(learning_rate, quadratic, predicted_decrease, directions)
            noise = self._progress.noise_share(predicted_decrease)
            corrections = bias_corrections(settings.iterations + 1)
            fallback_rate = settings.adam_lr_ratio * learning_rate
            changes = []
            for index, variable in variables.items():
                if index in directions:
                    change = self._momentum_change(index, variable, rates[index], directions[index])
                elif index in rows:
                    change = self._change_of_rows(
                        index, variable, rows[index], corrections, fallback_rate
                    )
                else:
                    gradient = tf.cast(summed[index], variable.dtype)
                    change = self._fallback_change(index, gradient, corrections, fallback_rate)
                if self._decays(variable) and index not in rows:
                    rate = self._decay_rate(rates.get(index), noise, fallback_rate)
                    change -= tf.cast(settings.weight_decay * rate, variable.dtype) * variable
                settings.assign_add(variable, change)
                changes.append(change)
            if settings.watched_steps is not None:
                settings.watched_steps.observe(share, list(parts.values()), changes)
            return True

        def skip() -> bool:
            settings.skipped_steps.assign_add(1)
            return False

        tf.cond(usable, update, skip)

    def _rows_looked_up(
        self, variables: Mapping[int, Any], gradients: Sequence[Any]
    ) -> dict[int, SummedRows]:
        """Gradients of the rows that a batch used, where nothing else need be moved."""
        if current_placement().count > 1:
            return {}
        return {
            index: summed_rows(part, variables[index].shape[0])
            for index, part in zip(variables, gradients, strict=True)
            if isinstance(part, tf.IndexedSlices) and self._second_moments[index] is not None
        }

    def _decays(self, variable: Any) -> bool:
        # Biases and scales do not decay. They are few, and hold such things as the mean of
        # the targets.
        settings = self._settings
        matrix = settings.weight_decay is not None and len(variable.shape) >= 2
        return matrix and settings.may_decay(variable)

    def _decay_rate(self, rate: Any, noise: tf.Tensor, fallback_rate: tf.Tensor) -> tf.Tensor:
        """What the weight decay is multiplied by for one variable.

        Args:
            rate: The variable's `α_b`, or None without a block.
            noise: Share of noise in the gradient.
            fallback_rate: Learning rate of the fallback rule.
        """
        plain = _PLAIN_DECAY * fallback_rate
        if rate is None:
            return plain
        # Steps have the units of the curvature where a lowest loss is known.
        natural = rate * noise / (1 - self._settings.momentum)
        return tf.where(self._progress.measured_from_lowest, natural, plain)

    def _rates(
        self,
        learning_rate: tf.Tensor,
        quadratic: tf.Tensor,
        predicted_decrease: tf.Tensor,
        directions: Mapping[int, tf.Tensor],
    ) -> tuple[dict[int, tf.Tensor], tf.Tensor]:
        """What to multiply directions by, by index; and the mean part of the longest step allowed.

        Args:
            learning_rate: The learning rate.
            quadratic: `g · F⁻¹ g`, a scalar.
            predicted_decrease: The same before gradients were clipped.
            directions: Preconditioned gradients by index.
        """
        members = {
            block.kernel: [
                i for i in (block.kernel, block.bias) if i is not None and i in directions
            ]
            for block in self._curvature.blocks
        }
        squares = tf.stack(
            [
                _mean_square([directions[i] for i in members.get(index, ())])
                for index in range(len(self._momentums))
            ]
        )
        polyak = self._settings.polyak_scaling
        query = StepQuery(
            learning_rate=learning_rate,
            momentum=self._settings.momentum,
            scale=tf.constant(1.0) if polyak is None else tf.cast(polyak, tf.float32),
            slope=predicted_decrease,
            clipped_slope=quadratic,
            squares=squares,
        )
        rates, longest = self._rule.rates(query), self._rule.longest(query)
        of_kernels = list(members)
        share = tf.math.divide_no_nan(tf.gather(rates, of_kernels), tf.gather(longest, of_kernels))
        by_variable = {i: rates[kernel] for kernel, own in members.items() for i in own}
        return by_variable, tf.reduce_mean(share)

    def _momentum_change(
        self, index: int, variable: Any, rate: tf.Tensor, direction: tf.Tensor
    ) -> tf.Tensor:
        """Moves the momentum of a variable with a block, and tells the variable's change."""
        momentum, settings = self._momentums[index], self._settings
        step = tf.cast(tf.cast(-rate, direction.dtype) * direction, variable.dtype)
        velocity = settings.momentum * momentum + step
        settings.assign(momentum, velocity)
        return settings.momentum * velocity + step if settings.nesterov else velocity

    def _change_of_rows(
        self,
        index: int,
        variable: Any,
        rows: SummedRows,
        corrections: tuple[tf.Tensor, ...],
        learning_rate: tf.Tensor,
    ) -> tf.IndexedSlices:
        """As `_fallback_change`, of the rows that were looked up and nothing else."""
        settings = self._settings
        moments = (self._momentums[index], self._second_moments[index])
        gradient = tf.cast(rows.values, variable.dtype)
        first, second = (_rows_of(moment, rows.indices) for moment in moments)
        change, *moved = adam_step(gradient, first, second, corrections, learning_rate)
        for moment, new in zip(moments, moved, strict=True):
            settings.assign(moment, tf.IndexedSlices(new, rows.indices))
        if self._decays(variable):
            rate = (settings.weight_decay or 0.0) * _PLAIN_DECAY * learning_rate
            rate = tf.cast(rate, variable.dtype)
            change -= rate * _rows_of(variable, rows.indices)
        return rows.once(change)

    def _fallback_change(
        self,
        index: int,
        gradient: tf.Tensor,
        corrections: tuple[tf.Tensor, ...],
        learning_rate: tf.Tensor,
    ) -> tf.Tensor:
        """Moves the moments of any other variable, and tells the variable's change."""
        first, second = self._momentums[index], self._second_moments[index]
        update, new_first, new_second = adam_step(
            gradient, first.value, second.value, corrections, learning_rate
        )
        self._settings.assign(first, new_first)
        self._settings.assign(second, new_second)
        return update


def _summed(
    variables: Mapping[int, Any], gradients: Sequence[Any], without: Mapping[int, Any]
) -> dict[int, tf.Tensor]:
    """Gradients summed over replicas, by index."""
    kept = {i: g for i, g in zip(variables, gradients, strict=True) if i not in without}
    parts = map(tf.convert_to_tensor, current_placement().sum(list(kept.values())))
    return dict(zip(kept, parts, strict=True))


def _rows_of(variable: Any, indices: tf.Tensor) -> tf.Tensor:
    """Some rows of a variable, `(N, ...)`."""
    return tf.gather(tf.convert_to_tensor(variable), indices)


def _mean_square(tensors: Sequence[tf.Tensor]) -> tf.Tensor:
    """Over all entries of some tensors, a float32 scalar; 0 where there is none."""
    if not tensors:
        return tf.zeros(())
    count = sum(t.shape.num_elements() for t in tensors)
    return tf.add_n([tf.reduce_sum(tf.square(tf.cast(t, tf.float32))) for t in tensors]) / count


def _inner_product(
    gradients: Mapping[int, tf.Tensor], directions: Mapping[int, tf.Tensor]
) -> tf.Tensor:
    """Sum over all variables with a direction, a float32 scalar."""
    parts = [tf.reduce_sum(tf.cast(gradients[i], d.dtype) * d) for i, d in directions.items()]
    return tf.add_n([tf.zeros(()), *(tf.cast(part, tf.float32) for part in parts)])
