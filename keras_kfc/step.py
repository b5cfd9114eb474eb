"""One step of the optimizer, given its factors: inverses, directions, size, momentum."""

import keras
import tensorflow as tf

from keras_kfc.blocks import all_finite
from keras_kfc.fallback import adam_step, bias_corrections
from keras_kfc.preconditioner import Preconditioner
from keras_kfc.progress import Progress
from keras_kfc.replicas import in_cross_replica_context, sum_over_replicas
from keras_kfc.resume import ResumableOptimizer
from keras_kfc.settable import Settable
from keras_kfc.telemetry import StepTelemetry

# Trust region of losses whose lowest value is not known, so that Polyak's rule does not apply.
_KL_CLIP_INSTEAD = 2e-4


class PreconditionedStep(ResumableOptimizer):
    """The part of `keras_kfc.KFC` that turns gradients into updates."""

    _preconditioner: Preconditioner
    progress: Progress
    # Sums over steps, where somebody watches; see `keras_kfc.callbacks.CurvatureMonitor`.
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

        def by_index(parts):
            parts = map(tf.convert_to_tensor, sum_over_replicas(parts))
            return dict(zip(variables, parts, strict=True))

        clipped = super()._clip_gradients(grads)
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
        squares = [tf.square(g) for i, g in gradients.items() if i not in directions]
        # Clipping by value would hide an infinity.
        usable = all_finite([quadratic, *whole.values(), *squares])
        learning_rate = tf.cast(learning_rate, tf.float32)

        def update():
            trust_scale = (
                self._step_factor(learning_rate, quadratic, promise) if directions else 1.0
            )
            step_size = learning_rate * trust_scale
            fallback_rate = self.fallback_lr_ratio * learning_rate
            decay_rate = step_size / (1 - self.momentum) * self._noise(promise)
            corrections = bias_corrections(self.iterations + 1)
            changes = []
            for index, variable in variables.items():
                if index in directions:
                    change = self._momentum_change(index, variable, step_size, directions[index])
                else:
                    gradient = tf.cast(gradients[index], variable.dtype)
                    change = self._fallback_change(
                        index, variable, gradient, corrections, fallback_rate
                    )
                if self._decays(variable):
                    rate = decay_rate if index in directions else fallback_rate
                    change -= tf.cast(self.weight_decay * rate, variable.dtype) * variable
                self.assign_add(variable, change)
                changes.append(change)
            if self.watched_steps is not None:
                self.watched_steps.observe(trust_scale, list(gradients.values()), changes)
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
        """Share of noise in the gradient, in [0, 1], or 1 where the lowest loss is not known.

        A quadratic loss without noise has `g · F⁻¹ g = 2 (L - L₀)`.

        Args:
            promise: `g · F⁻¹ g` of the gradient as it was before clipping, a scalar.
        """
        without = tf.math.divide_no_nan(2 * self.progress.excess.value, tf.maximum(promise, 0.0))
        return tf.where(self.progress.measured_from_lowest, 1 - tf.minimum(1.0, without), 1.0)

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

    def _step_factor(self, learning_rate, quadratic, promise):
        """Factor in [0, 1] that bounds the step.

        Args:
            learning_rate: The learning rate.
            quadratic: `g · F⁻¹ g`, a scalar.
            promise: The same before gradients were clipped.
        """
        quadratic, promise = tf.maximum(quadratic, 0.0), tf.maximum(promise, 0.0)
        seen = self.progress.seen
        # Before any loss has been seen the unit is 1.
        excess = tf.where(seen, self.progress.excess.value, 1.0)

        def within_trust_region(bound):
            bound *= excess if self.scale_free else 1.0
            squared = tf.math.divide_no_nan(bound, learning_rate**2 * quadratic)
            return tf.minimum(1.0, tf.sqrt(squared))

        factor = 1.0 if self.kl_clip is None else within_trust_region(self.kl_clip)
        part = self.polyak
        if part is not None:
            # What a gradient takes off the loss to first order, momentum included.
            decrease = learning_rate * promise / (1 - self.momentum)
            polyak = tf.math.divide_no_nan(
                tf.cast(part, tf.float32) * self.progress.pace() * excess, decrease
            )
            # In proportion to `polyak`, too, so that a schedule of it serves all losses.
            radius = tf.square(tf.cast(part, tf.float32)) * _KL_CLIP_INSTEAD
            instead = within_trust_region(radius) if self.kl_clip is None else 1.0
            known = self.progress.measured_from_lowest
            factor = tf.minimum(factor, tf.where(known, polyak, instead))
        return factor

    def _momentum_change(self, index, variable, step_size, direction):
        """Moves the momentum of a variable with a block, and tells the variable's change."""
        momentum = self._momentums[index]
        step = tf.cast(tf.cast(-step_size, direction.dtype) * direction, variable.dtype)
        velocity = self.momentum * momentum + step
        self.assign(momentum, velocity)
        return self.momentum * velocity + step if self.nesterov else velocity

    def _fallback_change(self, index, variable, gradient, corrections, learning_rate):
        """Moves the moments of any other variable, and tells the variable's change."""
        first, second = self._momentums[index], self._second_moments[index]
        update, new_first, new_second = adam_step(
            gradient, first.value, second.value, corrections, learning_rate
        )
        self.assign(first, new_first)
        self.assign(second, new_second)
        return update


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
