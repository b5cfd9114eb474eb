"""KFC: momentum gradient descent preconditioned by Kronecker factors.

One step, in the order of the paper's KFC-pre: factors from the captured
forward pass (`update_factors`), inverses, preconditioned directions, trust
region, momentum. What recurs every few steps is decided inside the graph.
"""

import logging
import random
from collections.abc import Mapping
from typing import Any

import keras
import tensorflow as tf

from keras_kfc.arguments import (
    check_boolean,
    check_choice,
    check_number,
    check_positive_integer,
    check_seed,
)
from keras_kfc.blocks import all_finite
from keras_kfc.capture import Capture, kronecker_optimizer, take_pending
from keras_kfc.fallback import adam_step
from keras_kfc.likelihood import FISHERS, output_derivatives
from keras_kfc.preconditioner import Preconditioner
from keras_kfc.statistics import (
    batch_gammas,
    batch_size_of,
    compile_loss,
    loss_terms,
    ordinary_gammas,
)

_logger = logging.getLogger("keras_kfc")
# The unit of the trust region is a moving average of the loss with this decay.
_LOSS_DECAY = 0.9


@keras.saving.register_keras_serializable(package="keras_kfc")
class KFC(keras.optimizers.Optimizer):
    """Kronecker Factors for Convolution, an approximate natural gradient.

    DOCSTRING
    """

    def __init__(
        self,
        learning_rate=0.05,
        damping=0.3,
        momentum=0.9,
        nesterov=True,
        kl_clip=3e-4,
        fisher="sampled",
        factor_decay=0.95,
        factor_update_period=10,
        inverse_update_period=20,
        scale_free=True,
        fallback_lr_ratio=0.05,
        seed=None,
        weight_decay=None,
        clipnorm=None,
        clipvalue=None,
        global_clipnorm=None,
        use_ema=False,
        ema_momentum=0.99,
        ema_overwrite_frequency=None,
        loss_scale_factor=None,
        gradient_accumulation_steps=None,
        name="kfc",
        **kwargs,
    ):
        super().__init__(
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            clipnorm=clipnorm,
            clipvalue=clipvalue,
            global_clipnorm=global_clipnorm,
            use_ema=use_ema,
            ema_momentum=ema_momentum,
            ema_overwrite_frequency=ema_overwrite_frequency,
            loss_scale_factor=loss_scale_factor,
            gradient_accumulation_steps=gradient_accumulation_steps,
            name=name,
            **kwargs,
        )
        self.momentum = check_number("momentum", momentum, 0, 1)
        self.nesterov = check_boolean("nesterov", nesterov)
        if kl_clip is not None:
            kl_clip = check_number("kl_clip", kl_clip, 0, exclude_low=True)
        self.kl_clip = kl_clip
        self.fisher = check_choice("fisher", fisher, FISHERS)
        self.factor_decay = check_number("factor_decay", factor_decay, 0, 1)
        self.factor_update_period = check_positive_integer(
            "factor_update_period", factor_update_period
        )
        self.inverse_update_period = check_positive_integer(
            "inverse_update_period", inverse_update_period
        )
        self.scale_free = check_boolean("scale_free", scale_free)
        self.fallback_lr_ratio = check_number("fallback_lr_ratio", fallback_lr_ratio, 0)
        self.seed = check_seed(seed)
        self._damping: Any = None
        self.damping = damping
        draw = random.randrange(2**31) if self.seed is None else self.seed
        self._draw_seed = self._counter("seed", initial=draw)
        self.skipped_steps = self._counter("skipped_steps")
        self.skipped_factor_updates = self._counter("skipped_factor_updates")
        self.skipped_inverse_updates = self._counter("skipped_inverse_updates")
        self._loss_average = self.add_variable((), dtype="float32", name="loss_average")
        self._loss_weight = self.add_variable((), dtype="float32", name="loss_weight")
        self._preconditioner: Preconditioner | None = None
        self._momentums: tuple[Any, ...] = ()
        self._second_moments: tuple[Any, ...] = ()
        self._noticed = False

    def _counter(self, name: str, initial: int = 0) -> keras.Variable:
        initializer = keras.initializers.Constant(initial)
        return self.add_variable((), initializer=initializer, dtype="int64", name=name)

    @property
    def damping(self):
        """Damping now: a variable, or the value of its schedule."""
        if isinstance(self._damping, keras.optimizers.schedules.LearningRateSchedule):
            return self._damping(self.iterations)
        return self._damping

    @damping.setter
    def damping(self, damping):
        schedule = keras.optimizers.schedules.LearningRateSchedule
        if isinstance(damping, schedule):
            if isinstance(self._damping, keras.Variable):
                self._untrack_variable(self._damping)
            self._damping = damping
            return
        if isinstance(self._damping, schedule):
            raise TypeError(
                "This optimizer was created with a `LearningRateSchedule` object as its "
                "`damping`, hence its damping is not settable. Create the optimizer with a "
                "float `damping` instead."
            )
        value = check_number("damping", damping, 0)
        if self._damping is None:
            self._damping = self.add_variable(
                (),
                initializer=keras.initializers.Constant(value),
                name="damping",
                aggregation="only_first_replica",
            )
        else:
            self._damping.assign(value)

    @property
    def blocks(self):
        """The Kronecker blocks, one for each covered layer; empty before `build`."""
        return [] if self._preconditioner is None else list(self._preconditioner.blocks)

    def build(self, variables):
        """Creates factors, inverses and momenta.

        Args:
            variables: The trainable variables.
        """
        if self.built:
            return
        super().build(variables)
        indices = self._trainable_variables_indices
        self._preconditioner = Preconditioner(
            variables, lambda variable: indices.get(self._var_key(variable)), self.add_variable
        )
        covered = self._preconditioner.covered
        self._momentums = tuple(self.add_optimizer_variables(variables, "momentum"))
        self._second_moments = tuple(
            None
            if index in covered
            else self.add_variable_from_reference(variable, name="second_moment")
            for index, variable in enumerate(variables)
        )

    def update_factors(
        self, capture: Capture, loss=None, y_true=None, y_pred=None, sample_weight=None
    ) -> None:
        """Updates the factors from one forward pass, if that is due.

        `fit` does this by itself; custom training loops call it between the
        forward pass and `apply_gradients`.

        Args:
            capture: The capture that was open during the forward pass.
            loss: The loss, as `keras.Model.compile` takes it.
            y_true: Targets.
            y_pred: The model's outputs in the forward pass.
            sample_weight: Sample weights or None.

        Raises:
            ValueError: If the optimizer is not built, or the loss has no known
                Fisher matrix and `fisher` is not `"empirical"`.
        """
        if not self.built:
            raise ValueError(
                "The optimizer has no factors yet. Call "
                "`optimizer.build(model.trainable_variables)` before `update_factors`."
            )
        compiled = compile_loss(loss)
        value = compiled(y_true, y_pred, sample_weight)
        self._update_factors(capture, compiled, y_true, y_pred, sample_weight, value)

    def _update_factors(self, capture, compiled, y_true, y_pred, sample_weight, loss_value):
        self._observe_loss(loss_value)
        seed = tf.stack([tf.cast(self._draw_seed, tf.int64), tf.cast(self._iterations, tf.int64)])

        def gammas(wanted):
            terms = loss_terms(compiled, y_true, y_pred, sample_weight)
            return batch_gammas(capture, output_derivatives(terms, self.fisher, seed), wanted)

        self._accumulate(capture, batch_size_of(y_pred), gammas)

    def _accumulate(self, capture, batch_size, gammas):
        preconditioner = self._preconditioner
        blocks = preconditioner.blocks_in(capture)
        if not blocks:
            return
        capture.check_reachable()

        def update():
            refused = preconditioner.accumulate(capture, batch_size, gammas, self.factor_decay)
            self.skipped_factor_updates.assign_add(tf.cast(refused, tf.int64))
            return True

        due = self._due(self.factor_update_period)
        tf.cond(due | preconditioner.missing_factors(blocks), update, lambda: False)

    def _due(self, period):
        """Whether something with this period is due now, a boolean scalar."""
        return tf.equal(self.iterations % period, 0)

    def _observe_loss(self, value):
        value = tf.abs(tf.cast(value, tf.float32))
        rate = tf.where(tf.math.is_finite(value), 1 - _LOSS_DECAY, 0.0)
        value = tf.where(tf.math.is_finite(value), value, 0.0)
        self._loss_average.assign_add(rate * (value - self._loss_average))
        self._loss_weight.assign_add(rate * (1 - self._loss_weight))

    def apply(self, grads, trainable_variables=None):
        """Updates the variables, after taking in a pending forward pass.

        Args:
            grads: Gradients.
            trainable_variables: The variables they belong to; optional once
                the optimizer is built.
        """
        if not self.built and trainable_variables is not None:
            trainable_variables = list(trainable_variables)
            with keras.name_scope(self.name, caller=self):
                self.build(trainable_variables)
        capture = take_pending(self)
        if capture is not None and self.built:
            self._use_pending(capture)
        super().apply(grads, trainable_variables)

    def _use_pending(self, capture):
        loss = capture.loss
        if loss is not None:
            self._update_factors(
                capture, loss.compiled, loss.y_true, loss.y_pred, loss.sample_weight, loss.value
            )
            return
        if self.fisher != "empirical" and not self._noticed:
            self._noticed = True
            _logger.warning(
                "KFC uses the empirical Fisher matrix, because %s is trained without its "
                "compiled loss, so that the model's own distribution is not known. On "
                'regression this can diverge where fisher="sampled" does not. Let the train '
                "step call `compute_loss`, or use `keras_kfc.Capture` in it.",
                type(capture.model).__name__,
            )
        records = [r for r in capture.records.values() if r.ordinary_derivatives]
        if not records:
            return
        batch_size = tf.shape(records[0].inputs[0])[0]
        scale = tf.cast(batch_size, tf.float32) / self._total_loss_scale(capture.model)
        self._accumulate(
            capture, batch_size, lambda wanted: ordinary_gammas(capture, scale, wanted)
        )

    def _total_loss_scale(self, model):
        """What the loss was multiplied by before the ordinary backward pass."""
        scale = 1.0 if self.loss_scale_factor is None else float(self.loss_scale_factor)
        outer = model.optimizer
        if outer is not self and kronecker_optimizer(outer) is self:
            scale *= tf.cast(outer.dynamic_scale, tf.float32)
        return scale

    def _backend_update_step(self, grads, trainable_variables, learning_rate):
        if tf.distribute.get_strategy().num_replicas_in_sync > 1:
            raise ValueError(
                "KFC does not support several replicas yet. Received: a strategy with "
                f"{tf.distribute.get_strategy().num_replicas_in_sync} replicas"
            )
        variables = {self._get_variable_index(v): v for v in trainable_variables}
        gradients = {
            index: tf.convert_to_tensor(gradient)
            for index, gradient in zip(variables, grads, strict=True)
        }
        self._refresh_inverses()
        directions = self._preconditioner.directions(gradients)
        quadratic = tf.add_n(
            [tf.zeros(())]
            + [
                tf.cast(tf.reduce_sum(tf.cast(gradients[i], d.dtype) * d), tf.float32)
                for i, d in directions.items()
            ]
        )
        usable = all_finite([quadratic, *gradients.values()])
        learning_rate = tf.cast(learning_rate, tf.float32)

        def update():
            scale = -learning_rate * self._trust(learning_rate**2 * quadratic)
            for index, variable in variables.items():
                if index in directions:
                    self._momentum_step(index, variable, scale, directions[index])
                else:
                    self._fallback_step(index, variable, learning_rate, gradients[index])
            return True

        def skip():
            self.skipped_steps.assign_add(1)
            return False

        tf.cond(usable, update, skip)

    def _refresh_inverses(self):
        preconditioner = self._preconditioner
        if not preconditioner.blocks:
            return

        def refresh():
            refused = preconditioner.refresh_inverses(
                tf.cast(self.damping, tf.float32), self.scale_free
            )
            self.skipped_inverse_updates.assign_add(tf.cast(refused, tf.int64))
            return True

        due = self._due(self.inverse_update_period)
        tf.cond(due | preconditioner.missing_inverses(), refresh, lambda: False)

    def _trust(self, quadratic):
        """Factor in [0, 1] that keeps the step within the trust region."""
        if self.kl_clip is None:
            return 1.0
        bound = tf.constant(self.kl_clip, tf.float32)
        if self.scale_free:
            # Before any loss has been seen the unit is 1.
            seen = self._loss_weight > 0
            unit = tf.math.divide_no_nan(self._loss_average.value, self._loss_weight.value)
            bound *= tf.where(seen, unit, 1.0)
        return tf.minimum(1.0, tf.sqrt(tf.math.divide_no_nan(bound, tf.maximum(quadratic, 0.0))))

    def _momentum_step(self, index, variable, scale, direction):
        momentum = self._momentums[index]
        step = tf.cast(tf.cast(scale, direction.dtype) * direction, variable.dtype)
        velocity = self.momentum * momentum + step
        self.assign(momentum, velocity)
        self.assign_add(variable, self.momentum * velocity + step if self.nesterov else velocity)

    def _fallback_step(self, index, variable, learning_rate, gradient):
        first, second = self._momentums[index], self._second_moments[index]
        update, new_first, new_second = adam_step(
            tf.cast(gradient, variable.dtype),
            first.value,
            second.value,
            self.iterations + 1,
            self.fallback_lr_ratio * learning_rate,
        )
        self.assign(first, new_first)
        self.assign(second, new_second)
        self.assign_add(variable, update)

    def get_config(self):
        """Configuration from which `from_config` makes an equal optimizer."""
        damping = self._damping
        if isinstance(damping, keras.Variable):
            damping = float(damping.numpy())
        else:
            damping = keras.optimizers.schedules.serialize(damping)
        return {
            **super().get_config(),
            "damping": damping,
            "momentum": self.momentum,
            "nesterov": self.nesterov,
            "kl_clip": self.kl_clip,
            "fisher": self.fisher,
            "factor_decay": self.factor_decay,
            "factor_update_period": self.factor_update_period,
            "inverse_update_period": self.inverse_update_period,
            "scale_free": self.scale_free,
            "fallback_lr_ratio": self.fallback_lr_ratio,
            "seed": self.seed,
        }

    @classmethod
    def from_config(cls, config, custom_objects=None):
        """Makes an optimizer from its configuration."""
        if isinstance(config.get("damping"), dict):
            damping = keras.saving.deserialize_keras_object(
                config["damping"], custom_objects=custom_objects
            )
            config = {**config, "damping": damping}
        return super().from_config(config, custom_objects=custom_objects)
