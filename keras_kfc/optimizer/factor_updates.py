"""How the optimizer learns of forward passes and takes factors from them."""

import contextlib
import logging
import math

import keras
import tensorflow as tf

from keras_kfc._compat.keras_internals import compile_loss
from keras_kfc._compat.tensorflow_internals import outside_of_the_trace
from keras_kfc.layers.instrumented import INSTRUMENTED, blocks_among, layers_in, told_to_fall_back
from keras_kfc.losses.derivatives import output_derivatives
from keras_kfc.losses.lowest import attainable_loss
from keras_kfc.losses.terms import loss_terms
from keras_kfc.optimizer.left_out import leave_out_what_has_no_statistics
from keras_kfc.optimizer.update import PreconditionedStep
from keras_kfc.passes.automatic import PendingCaptures, kronecker_optimizer, take_pending
from keras_kfc.passes.capture import Capture
from keras_kfc.passes.statistics import batch_gammas, batch_size_of, draw_examples, ordinary_gammas
from keras_kfc.placement.replicas import count_replicas, replica_number, sum_over_replicas

# Factors remember so many examples at least.
_FEWEST_EXAMPLES = 256.0
# Share of parameters with a block below which a line says so.
_SMALL_SHARE = 0.5
_logger = logging.getLogger("keras_kfc")


class FactorUpdates(PreconditionedStep):
    """The part of `keras_kfc.KFC` that keeps its factors up to date."""

    _noticed: bool
    _told: bool
    # Indices of kernels that a log line has told of, though their blocks could not go.
    _told_of: frozenset[int]
    pending_captures: PendingCaptures

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
            ValueError: If the optimizer is not built.
        """
        if not self.built:
            raise ValueError(
                "The optimizer has no factors yet. Call "
                "`optimizer.build(model.trainable_variables)` before `update_factors`."
            )
        if not isinstance(capture, Capture):
            raise TypeError(
                "Argument `capture` must be the `keras_kfc.Capture` of the forward pass. "
                f"Received: capture={capture!r} of type {type(capture).__name__}"
            )
        for name, given in (("loss", loss), ("y_pred", y_pred)):
            if given is None:
                raise ValueError(f"Argument `{name}` is needed. Received: {name}=None")
        # What the model captured by itself belongs to another forward pass.
        take_pending(self)
        compiled = compile_loss(loss)
        value = compiled(y_true, y_pred, sample_weight)
        self._update_factors(capture, compiled, y_true, y_pred, sample_weight, value)

    def _update_factors(self, capture, compiled, y_true, y_pred, sample_weight, loss_value):
        terms = loss_terms(compiled, y_true, y_pred, sample_weight, loss_value)
        # A loss that is not reduced is trained by the gradient of its sum.
        self._observe_loss(tf.reduce_sum(loss_value), attainable_loss(terms), batch_size_of(y_pred))

        def gammas(sample, partitions):
            derivatives = output_derivatives(terms, self.fisher, self._step_seed())
            self._noticed = self._noticed or derivatives.log_notes()
            return batch_gammas(capture, derivatives, sample, partitions)

        self._accumulate(capture, batch_size_of(y_pred), gammas)

    def _step_seed(self):
        """Two integers for the random numbers of this step."""
        seed = tf.cast(self._draw_seed, tf.int64) + (replica_number() << 48)
        return tf.stack([seed, tf.cast(self._iterations, tf.int64)])

    def _accumulate(self, capture, batch_size, gammas):
        preconditioner = self._preconditioner
        blocks = preconditioner.blocks_in(capture)
        if not blocks:
            return
        capture.check_reachable()

        def update():
            sample = draw_examples(batch_size, self.factor_samples, self._step_seed())
            # The other replicas have as many.
            examples = sample.size * count_replicas()
            decay = self._decay_of_factors(examples)
            refused = preconditioner.accumulate(capture, sample, gammas, examples, decay)
            self.skipped_factor_updates.assign_add(tf.cast(refused, tf.int64))
            return True

        due = self._is_due(self.factor_update_period)
        tf.cond(due | preconditioner.missing_factors(blocks), update, lambda: False)

    def _decay_of_factors(self, examples):
        """What is left of the weight of former batches after one of so many examples.

        Small batches are forgotten more slowly: a factor of a few examples is mostly noise.
        Micro-batches whose gradients are averaged count as one batch.
        """
        if not self.factor_decay:
            # Somebody wants the factors of the last batch and no other.
            return tf.zeros(())
        examples = tf.cast(examples, tf.float32)
        decay = tf.maximum(self.factor_decay, 1 - examples / _FEWEST_EXAMPLES)
        steps = self.gradient_accumulation_steps
        if steps is None:
            return decay
        # The first of them makes room for all.
        decay = tf.maximum(self.factor_decay, 1 - steps * examples / _FEWEST_EXAMPLES)
        return tf.where(self._iterations % steps == 0, decay, 1.0)

    def _observe_loss(self, value, attainable, examples):
        known = False
        if attainable is not None:
            known = tf.math.is_finite(attainable)
            value = tf.cast(value, tf.float32) - tf.where(known, attainable, 0.0)
        # Keras divides each replica's loss by their number.
        excess, examples = sum_over_replicas(
            [tf.cast(value, tf.float32), tf.cast(examples, tf.float32)]
        )
        steps = self.gradient_accumulation_steps
        complete = None if steps is None else tf.equal((self._iterations + 1) % steps, 0)
        self.progress.observe(excess, known, examples, complete)

    def apply(self, grads, trainable_variables=None):
        """Updates the variables, after taking in a pending forward pass.

        Args:
            grads: Gradients.
            trainable_variables: The variables they belong to; optional once
                the optimizer is built.
        """
        capture = take_pending(self)
        # The step will be traced once more.
        built_now = not self.built
        if not self.built and trainable_variables is not None:
            trainable_variables = list(trainable_variables)
            with contextlib.ExitStack() as stack:
                if self._has_seen_all(capture, trainable_variables):
                    stack.enter_context(outside_of_the_trace())
                    built_now = False
                stack.enter_context(keras.name_scope(self.name, caller=self))
                self.build(trainable_variables)
        if self.built:
            grads = list(grads)
            leave_out_what_has_no_statistics(self, capture, grads, trainable_variables, built_now)
        if capture is not None and self.built:
            self._use_pending(capture)
            if built_now:
                self._preconditioner.forget_captured()
        self._tell_what_falls_back(None if capture is None else capture.model)
        super().apply(grads, trainable_variables)

    def _has_seen_all(self, capture, variables):
        """Whether a capture has all that a train step uses, which need not be traced again then.

        What parts of a model do is not recorded before their kernels have an optimizer.
        """
        if capture is None or capture.loss is None or tf.distribute.has_strategy():
            return False
        kernels = {id(variables[index]) for index, _, _ in blocks_among(variables)}
        return kernels <= set(capture.records)

    def _tell_what_falls_back(self, model):
        """Says once if layers that could have a block have none, and nobody asked for that."""
        if self._told or not self.built:
            return
        self._told = True
        if not self.blocks:
            if not self._left_out:
                _logger.warning(
                    "KFC found no layer with a Kronecker block: its fallback rule, an Adam, trains "
                    "everything. Call `keras_kfc.instrument(model)` before training, or build the "
                    "model from `keras_kfc.layers`."
                )
            return
        self._tell_share()
        if model is not None:
            plain = [
                layer.path
                for layer, reason in layers_in(model)
                if type(layer) in INSTRUMENTED
                and layer.trainable_variables
                and not (reason or told_to_fall_back(layer))
            ]
            if plain:
                _logger.warning(
                    "The fallback rule of KFC trains %d layers that could have a Kronecker block, "
                    "but are not instrumented: %s. Call `keras_kfc.instrument(model)` on the whole "
                    "model, before it is compiled, or name them in its `exclude`.",
                    len(plain),
                    ", ".join(plain),
                )

    def _tell_share(self):
        """Says if most of the parameters have no block."""
        sizes = [math.prod(variable.shape) for variable in self._trainable_variables]
        share = sum(sizes[index] for index in self._preconditioner.covered) / max(1, sum(sizes))
        if share < _SMALL_SHARE:
            _logger.warning(
                "%.1f%% of the parameters have a Kronecker block. The fallback rule of KFC, an "
                "Adam, trains the others; `print(keras_kfc.coverage(model))` tells which.",
                100 * share,
            )

    def _use_pending(self, capture):
        loss = capture.loss
        if loss is not None:
            self._update_factors(
                capture, loss.compiled, loss.y_true, loss.y_pred, loss.sample_weight, loss.value
            )
            return
        # What was seen of another train step says nothing about this one.
        self.progress.forget()
        if not self._preconditioner.blocks_in(capture):
            return
        if self.fisher != "empirical" and not self._noticed:
            self._noticed = True
            _logger.warning(
                "KFC uses the empirical Fisher matrix, because %s is trained without its "
                "compiled loss, so that the model's own distribution is not known. On "
                'regression this can diverge where fisher="sampled" does not. Let the train '
                "step call the whole model and `compute_loss`, or use `keras_kfc.Capture` in it.",
                type(capture.model).__name__,
            )
        uses = [use for r in capture.records.values() for use in r.differentiated_uses()]
        if not uses:
            return
        batch_size = tf.shape(uses[0].inputs)[0]
        scale = tf.cast(batch_size, tf.float32) / self._total_loss_scale(capture)
        self._accumulate(
            capture,
            batch_size,
            lambda sample, partitions: ordinary_gammas(capture, scale, sample, partitions),
        )

    def _total_loss_scale(self, capture):
        """What the loss was multiplied by before the ordinary backward pass."""
        scale = 1.0 if self.loss_scale_factor is None else float(self.loss_scale_factor)
        outer = getattr(capture.model, "optimizer", None)
        half = any(r.uses[0].pre_activation.dtype == tf.float16 for r in capture.records.values())
        # Nobody can tell the scale. Nothing depends on it where damping is relative and steps
        # have the length of the bound.
        if outer is None and half and not (self.scale_free and self.polyak is not None):
            raise ValueError(
                "KFC cannot tell the loss scale of a train step in float16 that calls parts of "
                "the model, and `scale_free=False` and `polyak=None` depend on it. Call the whole "
                "model, use `keras_kfc.Capture` in the train step, or leave these arguments at "
                f"their defaults. Received: scale_free={self.scale_free}, polyak={self.polyak}"
            )
        if outer is not None and outer is not self and kronecker_optimizer(outer) is self:
            scale *= tf.cast(outer.dynamic_scale, tf.float32)
        return scale / count_replicas()
