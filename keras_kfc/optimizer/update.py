"""One step of the optimizer, given its factors: inverses, directions, size, momentum."""

import keras
import tensorflow as tf

from keras_kfc.curvature.block_diagonal import Preconditioner
from keras_kfc.curvature.kronecker import all_finite
from keras_kfc.optimizer.adam import SummedRows, adam_step, bias_corrections, summed_rows
from keras_kfc.optimizer.archive import ResumableOptimizer
from keras_kfc.optimizer.hyperparameter import Settable
from keras_kfc.optimizer.telemetry import StepTelemetry
from keras_kfc.placement.replicas import count_replicas, in_cross_replica_context, sum_over_replicas
from keras_kfc.steps.api import StepQuery, StepRule
from keras_kfc.steps.loss_trend import Progress
from keras_kfc.steps.plain import PlainSteps
from keras_kfc.steps.polyak import PolyakSteps
from keras_kfc.steps.trust_region import TrustRegion

# Weight decay of variables without a block, over that of kernels with one: with the default
# of 0.02, that of Keras's AdamW.
_PLAIN_DECAY = 0.2


class PreconditionedStep(ResumableOptimizer):
    """The part of `keras_kfc.KFC` that turns gradients into updates."""

    _preconditioner: Preconditioner
    progress: Progress
    step_size: PolyakSteps
    kl_clip: float | None
    scale_free: bool
    # Sums over steps, where somebody watches; see `keras_kfc.monitor.CurvatureMonitor`.
    watched_steps: StepTelemetry | None

    damping = Settable()
    polyak = Settable(optional=True)

    def watch_steps(self) -> bool:
        """Lets train steps that are traced from now on add to `watched_steps`.

        Returns:
            Whether nobody had asked for it before.
        """
        if self.watched_steps is not None:
            return False
        self.watched_steps = StepTelemetry()
        return True

    def _apply_weight_decay(self, variables):
        """Does nothing: decay belongs to the update, which broken gradients skip.

        It goes by the size of the step, too, where Keras's goes by the learning rate:
        that would outweigh the loss once steps get short.
        """

    def _clip_gradients(self, grads):
        """Does nothing: the update clips, which needs the gradients as they were, too."""
        return grads

    def _backend_update_step(self, grads, trainable_variables, learning_rate):
        variables = {self._get_variable_index(v): v for v in trainable_variables}
        clipped = super()._clip_gradients(grads)
        looked_up: dict[int, SummedRows] = {}
        if clipped is grads and count_replicas() == 1:
            looked_up = {
                index: summed_rows(part, variables[index].shape[0])
                for index, part in zip(variables, grads, strict=True)
                if isinstance(part, tf.IndexedSlices) and self._second_moments[index] is not None
            }

        def by_index(parts):
            parts = [
                part for index, part in zip(variables, parts, strict=True) if index not in looked_up
            ]
            parts = map(tf.convert_to_tensor, sum_over_replicas(parts))
            return dict(zip([i for i in variables if i not in looked_up], parts, strict=True))

        gradients = by_index(clipped)
        in_cross_replica_context(self._refresh_inverses)
        directions = self._preconditioner.directions(gradients)
        quadratic = promise = _inner_product(gradients, directions)
        whole = gradients if clipped is grads else by_index(grads)
        if clipped is not grads and self.polyak is not None and directions:
            # Clipping makes a step shorter. The smaller promise of a clipped gradient would
            # make it longer.
            promise = _inner_product(whole, self._preconditioner.directions(whole))
            # Clipping is there for gradients whose squares overflow.
            promise = tf.where(tf.math.is_finite(promise), promise, quadratic)
        # The fallback rule keeps squares, which may overflow where the gradient does not.
        rows = {index: part.values for index, part in looked_up.items()}
        parts = {**gradients, **rows}
        squares = [tf.square(g) for i, g in parts.items() if i not in directions]
        # Clipping by value would hide an infinity.
        usable = all_finite([quadratic, *whole.values(), *rows.values(), *squares])
        learning_rate = tf.cast(learning_rate, tf.float32)

        def update():
            rates, share = {}, tf.ones(())
            if directions:
                rates, share = self._rates(learning_rate, quadratic, promise, directions)
            fallback_rate = self.fallback_lr_ratio * learning_rate
            plain_decay = _PLAIN_DECAY * fallback_rate
            noise = self._noise(promise)
            corrections = bias_corrections(self.iterations + 1)
            changes = []
            for index, variable in variables.items():
                if index in directions:
                    change = self._momentum_change(index, variable, rates[index], directions[index])
                elif index in looked_up:
                    change = self._change_of_rows(
                        index, variable, looked_up[index], corrections, fallback_rate
                    )
                else:
                    gradient = tf.cast(gradients[index], variable.dtype)
                    change = self._fallback_change(
                        index, variable, gradient, corrections, fallback_rate
                    )
                if self._decays(variable) and index not in looked_up:
                    rate = plain_decay
                    if index in directions:
                        # Steps have the units of the curvature where a lowest loss is known.
                        natural = rates[index] * noise / (1 - self.momentum)
                        rate = tf.where(self.progress.measured_from_lowest, natural, plain_decay)
                    change -= tf.cast(self.weight_decay * rate, variable.dtype) * variable
                self.assign_add(variable, change)
                changes.append(change)
            if self.watched_steps is not None:
                self.watched_steps.observe(share, list(parts.values()), changes)
            return True

        def skip():
            self.skipped_steps.assign_add(1)
            return False

        tf.cond(usable, update, skip)

    def _decays(self, variable):
        # Biases and scales do not decay. They are few, and hold such things as the mean of
        # the targets.
        if self.weight_decay is None or len(variable.shape) < 2:
            return False
        # Names are those of TensorFlow's variables, which hold the layer's, too.
        return self._use_weight_decay(
            variable.value if isinstance(variable, keras.Variable) else variable
        )

    def _noise(self, promise):
        """Share of noise in the gradient, in [0, 1], where the lowest loss is known.

        A quadratic loss without noise has `g · F⁻¹ g = 2 (L - L₀)`.

        Args:
            promise: `g · F⁻¹ g` of the gradient as it was before clipping, a scalar.
        """
        without = tf.math.divide_no_nan(2 * self.progress.excess.value, tf.maximum(promise, 0.0))
        return 1 - tf.minimum(1.0, without)

    def _refresh_inverses(self):
        preconditioner = self._preconditioner
        if not preconditioner.blocks:
            return

        def refresh():
            self._average_over_replicas()
            refused = preconditioner.refresh_inverses(
                tf.cast(self.damping, tf.float32), self.scale_free
            )
            self.skipped_inverse_updates.assign_add(tf.cast(refused, tf.int64))
            return True

        due = self._is_due(self.inverse_update_period)
        tf.cond(due | preconditioner.missing_inverses(), refresh, lambda: False)

    def _is_due(self, period):
        """Whether something with this period is due now, a boolean scalar.

        Curvature changes fast at the start. Old inverses then let steps through that
        are far too long, and what these do to the weights is not undone soon.
        So what has a period is due in each of the first 8 steps, in every second of the
        next 8, in every fourth of the next 16, and so on, up to the period.
        """
        step = tf.cast(self.iterations, tf.int64)
        gaps = tf.constant(_growing_gaps(period, self.factor_update_period), tf.int64)
        gap = tf.reduce_max(tf.where(step >= 4 * gaps, gaps, 1))
        return tf.equal(step % gap, 0)

    def _rates(self, learning_rate, quadratic, promise, directions):
        """What to multiply directions by, by index; and the mean part of the longest step allowed.

        Args:
            learning_rate: The learning rate.
            quadratic: `g · F⁻¹ g`, a scalar.
            promise: The same before gradients were clipped.
            directions: Preconditioned gradients by index.
        """
        members = {
            block.kernel: [i for i in (block.kernel, block.bias) if i in directions]
            for block in self._preconditioner.blocks
        }
        squares = tf.stack(
            [
                _mean_square([directions[i] for i in members.get(index, ())])
                for index in range(len(self._trainable_variables))
            ]
        )
        query = StepQuery(
            learning_rate=learning_rate,
            momentum=self.momentum,
            scale=tf.constant(1.0) if self.polyak is None else tf.cast(self.polyak, tf.float32),
            slope=promise,
            clipped_slope=quadratic,
            squares=squares,
        )
        rule = self._step_rule()
        rates, longest = rule.rates(query), rule.longest(query)
        of_kernels = list(members)
        share = tf.math.divide_no_nan(tf.gather(rates, of_kernels), tf.gather(longest, of_kernels))
        by_variable = {i: rates[kernel] for kernel, own in members.items() for i in own}
        return by_variable, tf.reduce_mean(share)

    def _step_rule(self) -> StepRule:
        rule: StepRule = PlainSteps() if self.polyak is None else self.step_size
        if self.kl_clip is None:
            return rule
        return TrustRegion(rule, self.kl_clip, self.scale_free, self.progress)

    def _momentum_change(self, index, variable, step_size, direction):
        """Moves the momentum of a variable with a block, and tells the variable's change."""
        momentum = self._momentums[index]
        step = tf.cast(tf.cast(-step_size, direction.dtype) * direction, variable.dtype)
        velocity = self.momentum * momentum + step
        self.assign(momentum, velocity)
        return self.momentum * velocity + step if self.nesterov else velocity

    def _change_of_rows(self, index, variable, rows, corrections, learning_rate):
        """As `_fallback_change`, of the rows that were looked up and nothing else."""
        moments = (self._momentums[index], self._second_moments[index])
        gradient = tf.cast(rows.values, variable.dtype)
        first, second = (_rows_of(moment, rows.indices) for moment in moments)
        change, *moved = adam_step(gradient, first, second, corrections, learning_rate)
        for moment, new in zip(moments, moved, strict=True):
            self.assign(moment, tf.IndexedSlices(new, rows.indices))
        if self._decays(variable):
            rate = tf.cast(self.weight_decay * _PLAIN_DECAY * learning_rate, variable.dtype)
            change -= rate * _rows_of(variable, rows.indices)
        return rows.once(change)

    def _fallback_change(self, index, variable, gradient, corrections, learning_rate):
        """Moves the moments of any other variable, and tells the variable's change."""
        first, second = self._momentums[index], self._second_moments[index]
        update, new_first, new_second = adam_step(
            gradient, first.value, second.value, corrections, learning_rate
        )
        self.assign(first, new_first)
        self.assign(second, new_second)
        return update


def _rows_of(variable, indices):
    """Some rows of a variable, `(N, ...)`."""
    return tf.gather(tf.convert_to_tensor(variable), indices)


def _mean_square(tensors):
    """Over all entries of some tensors, a float32 scalar; 0 where there is none."""
    if not tensors:
        return tf.zeros(())
    count = sum(t.shape.num_elements() for t in tensors)
    return tf.add_n([tf.reduce_sum(tf.square(tf.cast(t, tf.float32))) for t in tensors]) / count


def _inner_product(gradients, directions):
    """Sum over all variables with a direction, a float32 scalar."""
    parts = [tf.reduce_sum(tf.cast(gradients[i], d.dtype) * d) for i, d in directions.items()]
    return tf.add_n([tf.zeros(()), *(tf.cast(part, tf.float32) for part in parts)])


def _growing_gaps(period, factor_period):
    """Steps between updates as training goes on: 1, 2, 4, ... up to the period.

    Beyond the period of the factors, gaps are multiples of it, so that inverses are those
    of new factors.
    """
    gaps = [1]
    while 2 * gaps[-1] < min(period, factor_period):
        gaps.append(2 * gaps[-1])
    gap = max(factor_period, 2)
    while gap < period:
        gaps.append(gap)
        gap *= 2
    return [*gaps, period] if period > 1 else gaps
