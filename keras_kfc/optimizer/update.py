"""One step of the optimizer, given its curvature: directions, size, momentum, decay."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import tensorflow as tf

from keras_kfc.curvature.api import Curvature
from keras_kfc.linalg.precision import all_finite
from keras_kfc.optimizer.adam import bias_corrections
from keras_kfc.optimizer.batch_models import BatchModels
from keras_kfc.optimizer.directions import Directions, directions_of
from keras_kfc.optimizer.moves import Moves
from keras_kfc.optimizer.rows import SummedRows, summed_rows
from keras_kfc.optimizer.settings import Settings
from keras_kfc.optimizer.shared_directions import shared_natural_gradient
from keras_kfc.optimizer.step_sizes import StepSizes
from keras_kfc.passes.products import GradientProduct
from keras_kfc.placement.current import current_placement
from keras_kfc.steps.api import StepRule
from keras_kfc.steps.loss_trend import Progress
from keras_kfc.utils.branches import run_if

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
        batch_models: Makes quadratic models of the loss, for rules that ask for them.
    """

    def __init__(
        self,
        settings: Settings,
        curvature: Curvature,
        rule: StepRule,
        progress: Progress,
        momentums: Sequence[Any],
        second_moments: Sequence[Any],
        batch_models: BatchModels | None = None,
    ):
        self._batch_models = batch_models
        self._settings, self._curvature = settings, curvature
        self._rule = rule
        self._sizes = StepSizes(settings, curvature, rule, progress, len(momentums))
        self._momentums, self._second_moments = momentums, second_moments
        self._offered: Mapping[int, GradientProduct] = {}

    def offer(self, products: Mapping[int, GradientProduct]) -> None:
        """Tells which of the gradients of the next step are products, by index of the kernel."""
        self._offered = products

    def take(
        self,
        variables: Mapping[int, Any],
        gradients: Sequence[Any],
        clip: Callable[[Sequence[Any]], Sequence[Any]],
        learning_rate: tf.Tensor,
    ) -> None:
        """Takes one step; one whose gradients are not finite is counted and left out.

        Args:
            variables: The variables by index, in the order of the gradients.
            gradients: Their gradients on this replica, tensors or `tf.IndexedSlices`.
            clip: Makes gradients the ones to step along; returns what it gets if nothing is to
                be clipped.
            learning_rate: A scalar.
        """
        settings = self._settings
        # Clipping is that of one device with the whole batch.
        gradients = _summed(gradients)
        clipped = clip(gradients)
        rows = self._rows_looked_up(variables, gradients) if clipped is gradients else {}
        summed = _by_index(variables, clipped, rows)
        products = self._products_of(gradients, clipped)
        directions = self._directions_of(summed, rows, products)
        slopes = clipped_slopes = _slopes(directions, summed)
        whole = summed if clipped is gradients else _by_index(variables, gradients, rows)
        if clipped is not gradients and settings.polyak_scaling is not None:
            # Clipping makes a step shorter. The smaller promise of a clipped gradient would
            # make it longer.
            slopes = _slopes(self._directions_of(whole, {}, {}), whole)
            # Clipping is there for gradients whose squares overflow.
            slopes = tf.where(tf.math.is_finite(slopes), slopes, clipped_slopes)
        clipped_slope = tf.reduce_sum(clipped_slopes)
        # The fallback rule keeps squares, which may overflow where the gradient does not.
        values = {index: part.values for index, part in rows.items()}
        parts = {**summed, **values}
        squares = [tf.square(g) for i, g in parts.items() if i not in directions]
        # What is not finite in a gradient makes its product with its direction so. Clipping by
        # value would hide an infinity.
        hidden = (i for i in whole if clipped is not gradients or i not in directions)
        usable = all_finite(
            [clipped_slope, *(whole[i] for i in hidden), *values.values(), *squares]
        )
        learning_rate = tf.cast(learning_rate, tf.float32)
        query = self._sizes.query(learning_rate, clipped_slope, slopes, directions)
        if self._batch_models is not None and self._batch_models.knows(directions):
            directions, query = self._batch_models.asked(
                query, directions, summed, self._sizes.members(directions)
            )

        def update() -> None:
            fallback_rate = settings.adam_lr_ratio * learning_rate
            plain_decay = _PLAIN_DECAY * fallback_rate * (settings.weight_decay or 0.0)
            factors: dict[int, tf.Tensor] = {}
            decays: dict[int, tf.Tensor] = {}
            share, momentum, kept = tf.ones(()), settings.momentum, tf.ones(())
            if directions:
                momentum = self._rule.momentum(query)
                rates, share = self._sizes.rates(query, directions)
                factors = self._sizes.by_variable(-rates, directions)
                if self._batch_models is not None and query.model is not None:
                    rate = tf.reduce_max(rates)
                    kept = self._batch_models.tried(variables, directions, query, rate, momentum)
                    momentum *= kept
                    factors = {index: kept * factor for index, factor in factors.items()}
                decay = self._sizes.decay_rates(rates, tf.reduce_sum(slopes), plain_decay)
                decays = self._sizes.by_variable(decay, directions)
            corrections = bias_corrections(settings.iterations + 1)
            moves = Moves(
                settings,
                self._momentums,
                self._second_moments,
                momentum,
                settings.nesterov and query.model is None,
            )
            changes = []
            for index, variable in variables.items():
                used = rows.get(index)
                if index in directions:
                    change = moves.with_block(
                        index,
                        variable,
                        factors[index],
                        directions.of[index],
                        used,
                        directions.moving_rows(index),
                    )
                else:
                    gradient = summed[index] if used is None else used.values
                    change = moves.without_block(
                        index, variable, gradient, corrections, fallback_rate, used
                    )
                if self._decays(variable):
                    rate = decays.get(index, plain_decay)
                    change -= tf.cast(rate, variable.dtype) * (
                        variable if used is None else used.rows_of(variable)
                    )
                if used is not None:
                    change = used.once(change)
                settings.assign_add(variable, change)
                changes.append(change)
            if settings.watched_steps is not None:
                settings.watched_steps.observe(share, list(parts.values()), changes, kept)

        run_if(usable, update)
        if self._batch_models is not None:
            self._batch_models.done()
        settings.skipped_steps.assign_add(tf.cast(~usable, tf.int64))

    def _directions_of(
        self,
        gradients: Mapping[int, tf.Tensor],
        rows: Mapping[int, SummedRows],
        products: Mapping[int, GradientProduct],
    ) -> Directions:
        """Preconditioned gradients, by all replicas or each its share."""
        alone = current_placement().count == 1 or not self._curvature.blocks
        if alone or self._settings.sharding != "preconditioning":
            return directions_of(self._curvature, gradients, rows, products)
        found = shared_natural_gradient(self._curvature, gradients)
        return Directions(found, rows, self._curvature.tables)

    def _products_of(
        self, gradients: Sequence[Any], clipped: Sequence[Any]
    ) -> dict[int, GradientProduct]:
        """What was offered and is still what the step goes along."""
        offered, self._offered = self._offered, {}
        if clipped is not gradients or current_placement().count > 1:
            return {}
        # Keras may have scaled, accumulated or replaced gradients since.
        here = {id(gradient) for gradient in gradients}
        return {
            index: product
            for index, product in offered.items()
            if all(id(gradient) in here for gradient in product.gradients)
        }

    def _rows_looked_up(
        self, variables: Mapping[int, Any], gradients: Sequence[Any]
    ) -> dict[int, SummedRows]:
        """Gradients of the rows that a batch used, where nothing else need be moved."""
        if current_placement().count > 1 or self._batch_models is not None:
            return {}
        return {
            index: summed_rows(part, variables[index].shape[0])
            for index, part in zip(variables, gradients, strict=True)
            if isinstance(part, tf.IndexedSlices)
            and (self._second_moments[index] is not None or index in self._curvature.tables)
        }

    def _decays(self, variable: Any) -> bool:
        # Biases and scales do not decay. They are few, and hold such things as the mean of
        # the targets.
        settings = self._settings
        matrix = settings.weight_decay is not None and len(variable.shape) >= 2
        return matrix and settings.may_decay(variable)


def _slopes(directions: Directions, gradients: Mapping[int, tf.Tensor]) -> tf.Tensor:
    """`g · F⁻¹ g` of all variables but tables, and of tables, `(2,)`."""
    tables = directions.tables
    others = [index for index in directions.of if index not in tables]
    return tf.stack([directions.slope(gradients, among) for among in (others, tables)])


def _summed(gradients: Sequence[Any]) -> Sequence[Any]:
    """Gradients of the whole batch: themselves on one replica, sums over all on several."""
    placement = current_placement()
    if placement.count == 1:
        return gradients
    return placement.sum(list(map(tf.convert_to_tensor, gradients)))


def _by_index(
    variables: Mapping[int, Any], gradients: Sequence[Any], without: Mapping[int, Any]
) -> dict[int, tf.Tensor]:
    """Gradients as tensors, by index."""
    return {
        index: tf.convert_to_tensor(gradient)
        for index, gradient in zip(variables, gradients, strict=True)
        if index not in without
    }
