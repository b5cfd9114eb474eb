"""The rates of a step's blocks: what the rule of the step size is asked, and what follows."""

import tensorflow as tf

from keras_kfc.curvature.api import Curvature
from keras_kfc.optimizer.directions import Directions
from keras_kfc.optimizer.settings import Settings
from keras_kfc.steps.api import StepQuery, StepRule
from keras_kfc.steps.loss_trend import Progress

# Part of the weight decay that a step of Polyak's rule makes at most: of a loss E and a slope p the
# step is E / p and the noise 1 - 2 E / p, whose product is an eighth at most. More would come of
# a slope that has changed faster than the average of the loss, as where gradients vanish.
_MOST_DECAY = 0.125


class StepSizes:
    """Asks a rule of the step size.

    Args:
        settings: The optimizer.
        curvature: Its curvature.
        rule: The rule.
        progress: The losses that the optimizer has seen.
        variables: Number of trainable variables.
    """

    def __init__(
        self,
        settings: Settings,
        curvature: Curvature,
        rule: StepRule,
        progress: Progress,
        variables: int,
    ):
        self._settings, self._curvature = settings, curvature
        self._rule, self._progress, self._count = rule, progress, variables

    def decay_rates(self, rates: tf.Tensor, slope: tf.Tensor, plain_decay: tf.Tensor) -> tf.Tensor:
        """What the weights of each block are multiplied by and lose, `(variables,)`.

        Args:
            rates: `α_b`, likewise.
            slope: `g · F⁻¹ g` before gradients were clipped, a scalar.
            plain_decay: The same for variables without a block, a scalar.
        """
        settings = self._settings
        scale = settings.polyak_scaling
        most = 1.0 if scale is None else _MOST_DECAY * tf.cast(scale, tf.float32)
        if self._settings.step == "polyak":
            rates = rates / (1 - settings.momentum)
        rates = rates * self._progress.noise_share(slope)
        rates = tf.minimum(rates, most)
        decay = (settings.weight_decay or 0.0) * rates
        # Steps have the units of the curvature where a lowest loss is known.
        return tf.where(self._progress.measured_from_lowest, decay, plain_decay)

    def query(
        self,
        learning_rate: tf.Tensor,
        clipped_slope: tf.Tensor,
        slopes: tf.Tensor,
        directions: Directions,
    ) -> StepQuery:
        """What the rule of the step size is told.

        Args:
            learning_rate: The learning rate.
            clipped_slope: `g · F⁻¹ g`, a scalar.
            slopes: The same before gradients were clipped, `(2,)`,
                of all but tables and of tables.
            directions: Preconditioned gradients.
        """
        members = self.members(directions)
        own = [members.get(index, ()) for index in range(self._count)]
        squares = directions.mean_squares(own)
        polyak = self._settings.polyak_scaling
        return StepQuery(
            learning_rate=learning_rate,
            momentum=self._settings.momentum,
            scale=tf.constant(1.0) if polyak is None else tf.cast(polyak, tf.float32),
            slope=slopes[0],
            table_slope=slopes[1],
            clipped_slope=clipped_slope,
            squares=squares,
            tables=tf.constant([i in directions.tables for i in range(self._count)]),
        )

    def rates(self, query: StepQuery, directions: Directions) -> tuple[tf.Tensor, tf.Tensor]:
        """Rates of all blocks, `(variables,)`; and the mean part of the longest step allowed."""
        rates, longest = self._rule.rates(query), self._rule.longest(query)
        of_kernels = list(self.members(directions))
        share = tf.math.divide_no_nan(tf.gather(rates, of_kernels), tf.gather(longest, of_kernels))
        return rates, tf.reduce_mean(share)

    def members(self, directions: Directions) -> dict[int, list[int]]:
        """Indices of the variables of each block, by that of its kernel."""
        return {
            block.kernel_index: [index for index in block.indices.every if index in directions]
            for block in self._curvature.blocks
        }

    def by_variable(self, of_blocks: tf.Tensor, directions: Directions) -> dict[int, tf.Tensor]:
        """Numbers of blocks, `(variables,)`, by index of each of their variables."""
        apart = tf.unstack(of_blocks, self._count)
        members = self.members(directions)
        return {i: apart[kernel] for kernel, own in members.items() for i in own}
