"""Takes in forward passes: losses for the step size, statistics for the curvature."""

import functools
from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from keras_kfc.curvature.api import CurvatureBlock
from keras_kfc.curvature.block_diagonal import BlockDiagonal
from keras_kfc.curvature.turns import turns
from keras_kfc.linalg.stacks import Invert, invert_stacks
from keras_kfc.losses.derivatives import output_derivatives
from keras_kfc.losses.lowest import loss_lower_bound
from keras_kfc.losses.terms import loss_terms
from keras_kfc.optimizer.batch_models import BatchModels
from keras_kfc.optimizer.notices import Notices
from keras_kfc.optimizer.schedule import is_update_step
from keras_kfc.optimizer.settings import Settings
from keras_kfc.passes.automatic import kronecker_optimizer
from keras_kfc.passes.capture import Capture
from keras_kfc.passes.statistics import (
    BatchStatistics,
    ExampleSubset,
    batch_size_of,
    draw_examples,
    measure,
    measure_ordinary,
)
from keras_kfc.placement.averages import add_up
from keras_kfc.placement.current import current_placement, replica_number
from keras_kfc.placement.sharded import spread
from keras_kfc.steps.api import DampingRule
from keras_kfc.steps.loss_trend import Progress
from keras_kfc.utils.branches import run_if

# Factors remember so many examples at least.
_FEWEST_EXAMPLES = 256.0


class Measuring:
    """Keeps the curvature and the step rule's view of the loss up to date.

    Args:
        settings: The optimizer.
        curvature: Its curvature.
        damping: Its rule of damping.
        progress: The losses that it has seen.
        notices: What it has told the user.
        batch_models: What makes quadratic models of batches, if the step rule asks for them.

    Attributes:
        damping_rule: The rule of damping.
    """

    def __init__(
        self,
        settings: Settings,
        curvature: BlockDiagonal,
        damping: DampingRule,
        progress: Progress,
        notices: Notices,
        batch_models: BatchModels | None = None,
    ):
        self._batch_models = batch_models
        self._settings, self._curvature, self.damping_rule = settings, curvature, damping
        self._progress, self._notices = progress, notices

    def take_in_pending(self, capture: Capture) -> None:
        """Takes in what a model captured by itself, with its loss if that was seen."""
        loss = capture.loss
        if loss is None:
            self._take_in_hidden(capture)
        else:
            self.take_in(
                capture, loss.compiled, loss.y_true, loss.y_pred, loss.sample_weight, loss.value
            )

    def take_in(
        self,
        capture: Capture,
        compiled: Any,
        y_true: Any,
        y_pred: Any,
        sample_weight: Any,
        loss_value: tf.Tensor,
    ) -> None:
        """Takes in one forward pass with its loss; updates the factors if that is due.

        Args:
            capture: What was recorded in it.
            compiled: Keras's `CompileLoss`.
            y_true: Targets.
            y_pred: Outputs.
            sample_weight: Sample weights or None.
            loss_value: What the compiled loss returned.
        """
        terms = loss_terms(compiled, y_true, y_pred, sample_weight, loss_value)
        # A loss that is not reduced is trained by the gradient of its sum.
        self._observe_loss(
            tf.reduce_sum(loss_value), loss_lower_bound(terms), batch_size_of(y_pred)
        )
        if not self._can_use(capture):
            return
        if self._batch_models is not None:
            self._batch_models.take_in(capture, terms)

        def statistics(sample: ExampleSubset) -> BatchStatistics:
            derivatives = output_derivatives(terms, self._settings.fisher, self._step_seed())
            self._notices.tell_notes(derivatives)
            return measure(capture, derivatives, sample, self._curvature.layouts_in(capture))

        self._update_if_due(capture, batch_size_of(y_pred), statistics)

    def _take_in_hidden(self, capture: Capture) -> None:
        """Takes in a forward pass whose loss nobody saw, by its ordinary backward pass."""
        # What was seen of another train step says nothing about this one.
        self._progress.forget()
        if not self._curvature.blocks_in(capture):
            return
        if self._settings.fisher != "empirical":
            self._notices.tell_empirical(capture.model)
        uses = [use for r in capture.records.values() for use in r.differentiated_uses()]
        if not uses:
            return
        batch_size = tf.shape(uses[0].pre_activation)[0]
        scale = tf.cast(batch_size, tf.float32) / self._total_loss_scale(capture)
        if not self._can_use(capture):
            return
        layouts = self._curvature.layouts_in(capture)
        self._update_if_due(
            capture, batch_size, lambda sample: measure_ordinary(capture, scale, sample, layouts)
        )

    def refresh(self) -> None:
        """What follows the forward passes of all replicas; in cross-replica context."""
        self.average_over_replicas()
        self.refresh_inverses()

    def average_over_replicas(self) -> None:
        """Gives all replicas the same factors if any may have moved; in cross-replica context."""
        curvature, settings, placement = self._curvature, self._settings, current_placement()
        if placement.count == 1 or not curvature.blocks:
            return

        def agree() -> None:
            curvature.average_over_replicas(placement)
            add_up(placement, settings.rejected_factor_updates)

        run_if(self._is_due(settings.curvature_update_period) | curvature.may_move(), agree)

    def refresh_inverses(self) -> None:
        """Inverts the factors anew that are due; in cross-replica context."""
        curvature, period = self._curvature, self._settings.inverse_update_period
        groups = turns(curvature.blocks, max(1, period - 1)) if curvature.blocks else []
        for number, blocks in enumerate(groups):
            # Those whose turn is later start after a step that renews factors.
            due = self._is_due(period, number + 1 if len(groups) > 1 else 0)
            run_if(
                due | curvature.missing_inverses(blocks),
                functools.partial(self._refresh, number, blocks),
            )

    def _refresh(self, group: int, blocks: Sequence[CurvatureBlock]) -> None:
        damping, relative = self.damping_rule.damping(), self.damping_rule.relative
        invert: Invert = invert_stacks
        settings = self._settings
        if settings.sharding != "none":
            invert = functools.partial(spread, current_placement(), invert_stacks)
        refused = self._curvature.refresh(damping, relative, blocks, invert)
        settings.rejected_inverse_updates.assign_add(tf.cast(refused, tf.int64))
        if settings.watched_steps is not None:
            settings.watched_steps.observe_inverses(group, settings.iterations, refused)

    def _can_use(self, capture: Capture) -> bool:
        if not self._curvature.blocks_in(capture):
            return False
        capture.check_reachable()
        return True

    def _update_if_due(self, capture: Capture, batch_size: tf.Tensor, statistics: Any) -> None:
        """Moves the factors towards those of a batch if that is due.

        Args:
            capture: The captured forward pass.
            batch_size: Number of its examples, a scalar.
            statistics: Function from the examples to use to the statistics of the batch.
        """
        curvature, settings = self._curvature, self._settings
        curvature.note_captured(capture)

        def update() -> None:
            sample = draw_examples(batch_size, settings.factor_batch_size, self._step_seed())
            # The other replicas have as many.
            examples = sample.size * current_placement().count
            decay = self._decay_of_factors(examples)
            refused = curvature.update(statistics(sample), examples, decay)
            settings.rejected_factor_updates.assign_add(tf.cast(refused, tf.int64))
            if settings.watched_steps is not None:
                settings.watched_steps.observe_factors(settings.iterations, refused)

        due = self._is_due(settings.curvature_update_period)
        run_if(due | curvature.missing_factors(capture), update)

    def _is_due(self, period: int, turn: int = 0) -> tf.Tensor:
        settings = self._settings
        factor_period = settings.curvature_update_period
        return is_update_step(settings.iterations, period, factor_period, turn)

    def _step_seed(self) -> tf.Tensor:
        """Two integers for the random numbers of this step."""
        seed = tf.cast(self._settings.draw_seed, tf.int64) + (replica_number() << 48)
        return tf.stack([seed, tf.cast(self._settings.batches, tf.int64)])

    def _decay_of_factors(self, examples: tf.Tensor) -> tf.Tensor:
        """What is left of the weight of former batches after one of so many examples.

        Small batches are forgotten more slowly: a factor of a few examples is mostly noise.
        Micro-batches whose gradients are averaged count as one batch.
        """
        settings = self._settings
        if not settings.curvature_ema:
            # Somebody wants the factors of the last batch and no other.
            return tf.zeros(())
        examples = tf.cast(examples, tf.float32)
        decay = tf.maximum(settings.curvature_ema, 1 - examples / _FEWEST_EXAMPLES)
        steps = settings.gradient_accumulation_steps
        if steps is None:
            return decay
        # The first of them makes room for all.
        decay = tf.maximum(settings.curvature_ema, 1 - steps * examples / _FEWEST_EXAMPLES)
        return tf.where(settings.batches % steps == 0, decay, 1.0)

    def _observe_loss(
        self, value: tf.Tensor, attainable: tf.Tensor | None, examples: tf.Tensor
    ) -> None:
        unknown = tf.ones(())
        if attainable is not None:
            known = tf.math.is_finite(attainable)
            value = tf.cast(value, tf.float32) - tf.where(known, attainable, 0.0)
            unknown = tf.where(known, 0.0, 1.0)
        # Keras divides each replica's loss by their number.
        excess, examples, unknown = current_placement().sum(
            [tf.cast(value, tf.float32), tf.cast(examples, tf.float32), unknown]
        )
        steps = self._settings.gradient_accumulation_steps
        complete = None if steps is None else tf.equal((self._settings.batches + 1) % steps, 0)
        self._progress.observe(excess, tf.equal(unknown, 0), examples, complete)

    def _total_loss_scale(self, capture: Capture) -> Any:
        """What the loss was multiplied by before the ordinary backward pass."""
        settings = self._settings
        scale: Any = 1.0 if settings.loss_scale_factor is None else settings.loss_scale_factor
        outer = getattr(capture.model, "optimizer", None)
        half = any(r.uses[0].pre_activation.dtype == tf.float16 for r in capture.records.values())
        # Nobody can tell the scale. Nothing depends on it where damping is relative and steps
        # have the length of the bound.
        if (
            outer is None
            and half
            and not (settings.relative_damping and settings.polyak_scaling is not None)
        ):
            raise ValueError(
                "KFC cannot tell the loss scale of a train step in float16 that calls parts of "
                "the model, and `relative_damping=False` and `polyak_scaling=None` depend on it. "
                "Call the whole model, use `keras_kfc.Capture` in the train step, or leave these "
                "arguments at their defaults. Received: "
                f"relative_damping={settings.relative_damping}, "
                f"polyak_scaling={settings.polyak_scaling}"
            )
        if outer is not None and outer is not settings and kronecker_optimizer(outer) is settings:
            scale *= tf.cast(outer.dynamic_scale, tf.float32)
        return scale / current_placement().count
