"""The quadratic model of a batch's loss around the weights of now, and what became of it."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import tensorflow as tf

from keras_kfc.curvature.block_diagonal import BlockDiagonal
from keras_kfc.losses.output_curvature import OutputCurvature
from keras_kfc.losses.terms import LossTerm
from keras_kfc.optimizer.directions import Directions
from keras_kfc.optimizer.settings import Settings
from keras_kfc.passes.capture import Capture
from keras_kfc.steps.api import QuadraticModel, StepQuery
from keras_kfc.steps.levenberg_marquardt import FIRST_STEPS, PERIOD, LevenbergMarquardt
from keras_kfc.steps.quadratic_model import QuadraticSteps

# Part of the best step that a step must be to be judged.
_JUDGED = 0.5


@dataclasses.dataclass(frozen=True)
class _Batch:
    """What products with the Fisher matrix of a batch need."""

    capture: Capture
    curvature: OutputCurvature
    # Computes the loss once more, or None where nobody can.
    loss_again: Callable[[], tf.Tensor] | None


class BatchModels:
    """Makes the model of each batch, of the variables with a block, and judges steps by it.

    Args:
        settings: The optimizer.
        variables: Its trainable variables.
        curvature: Its curvature.
        damping: Its rule of damping.
        momentums: A variable for each trainable variable: its last change, where it has a block.
        rule: The rule of the step size.
    """

    def __init__(
        self,
        settings: Settings,
        variables: Sequence[Any],
        curvature: BlockDiagonal,
        damping: LevenbergMarquardt,
        momentums: Sequence[Any],
        rule: QuadraticSteps,
    ):
        self._rule = rule
        self._settings, self._curvature, self._damping = settings, curvature, damping
        self._trained, self._momentums = list(variables), momentums
        self._batch: _Batch | None = None

    def take_in(self, capture: Capture, terms: Sequence[LossTerm]) -> None:
        """Notes a forward pass, whose batch the next step is for."""
        self._batch = _Batch(capture, OutputCurvature(terms), capture.loss_again)

    def asked(
        self,
        query: StepQuery,
        directions: Directions,
        gradients: Mapping[int, tf.Tensor],
        members: Mapping[int, Sequence[int]],
    ) -> tuple[Directions, StepQuery]:
        """Adds the model of a batch that is known to what the rule of the step size is asked.

        Args:
            query: What it is asked.
            directions: Directions of the step.
            gradients: Their gradients, by index.
            members: Indices of the variables of each block.

        Returns:
            Directions that no layer moves too far along, and what is asked.
        """
        share = self._rule.share(query)
        blocks = [own for own in members.values() if own]
        directions, cut = directions.shortened(
            tf.math.divide_no_nan(query.learning_rate, share), blocks
        )
        longest = tf.where(cut, 1.0, float("inf"))
        model = self._model(directions.of, gradients, longest, share)
        return directions, dataclasses.replace(query, model=model)

    def _model(
        self,
        directions: Mapping[int, tf.Tensor],
        gradients: Mapping[int, tf.Tensor],
        longest: tf.Tensor,
        share: tf.Tensor,
    ) -> QuadraticModel:
        """The model over directions and last steps, of a batch that is known.

        Args:
            directions: By index of the variable, for all that have one.
            gradients: Their gradients.
            longest: The largest `α` that is allowed, a scalar.
            share: Part of the best step to take, a scalar.
        """
        batch, indices = self._batch, list(directions)
        assert batch is not None
        jacobian = batch.capture.jacobian(
            batch.curvature.sources, [self._trained[i] for i in indices]
        )
        vectors = [
            [tf.convert_to_tensor(directions[i]) for i in indices],
            [tf.convert_to_tensor(self._momentums[i]) for i in indices],
        ]
        roots = [batch.curvature.transposed_root_times(jacobian.times(v)) for v in vectors]
        own = [gradients[i] for i in indices]
        shifts = self._shifts()
        entries = [
            _dot(roots[a], roots[b]) + self._damped(indices, vectors[a], vectors[b], shifts)
            for a, b in ((0, 0), (0, 1), (1, 1))
        ]
        curvature = tf.reshape(tf.stack([entries[0], entries[1], entries[1], entries[2]]), (2, 2))
        slopes = tf.stack([_dot(own, vector) for vector in vectors])
        return QuadraticModel(curvature, slopes, longest, share)

    def knows(self, directions: Directions) -> bool:
        """Whether there is a batch whose outputs can be differentiated with regard to all weights.

        Args:
            directions: Those of a step.
        """
        return (
            bool(directions.of)
            and self._batch is not None
            and all(self._batch.capture.has_watched(self._trained[i]) for i in directions.of)
        )

    def tried(
        self,
        variables: Mapping[int, Any],
        directions: Directions,
        query: StepQuery,
        rate: tf.Tensor,
        momentum: tf.Tensor,
    ) -> tf.Tensor:
        """Tries a step, if that is due, and adapts damping to what it does to the batch's loss.

        Args:
            variables: The variables, by index.
            directions: Its directions.
            query: What the rule was asked, with the model.
            rate: `α`.
            momentum: `μ`.

        Returns:
            1 if it is to be taken, 0 if it makes the loss worse.
        """
        batch, model, settings = self._batch, query.model, self._settings
        if batch is None or batch.loss_again is None or model is None:
            return tf.ones(())
        loss_again = batch.loss_again
        own = [index for index in variables if index in directions]

        def judged() -> tf.Tensor:
            values = [tf.identity(tf.convert_to_tensor(variables[index])) for index in own]
            before = loss_again()
            for index in own:
                dtype = variables[index].dtype
                along = tf.cast(rate, dtype) * tf.cast(directions.of[index], dtype)
                onward = tf.cast(momentum, dtype) * tf.convert_to_tensor(self._momentums[index])
                settings.assign_add(variables[index], onward - along)
            foretold = model.change(rate, momentum)
            kept = self._damping.judge(before, loss_again(), foretold, model.share)
            for index, value in zip(own, values, strict=True):
                settings.assign(variables[index], value)
            return tf.cast(kept, tf.float32)

        steps = tf.cast(settings.iterations, tf.int64)
        due = (steps % PERIOD == 0) | (steps < FIRST_STEPS)
        # What a batch makes of a step against the noise of others says nothing.
        due &= model.share > _JUDGED
        kept: tf.Tensor = tf.cond(due, judged, lambda: tf.ones(()))
        return kept

    def done(self) -> None:
        """Forgets the batch."""
        self._batch = None

    def _shifts(self) -> dict[int, tf.Tensor]:
        """What damping adds to the curvature of each covered variable."""
        damping, shifts = self._damping.damping(), {}
        for block in self._curvature.blocks:
            shift = damping
            if self._damping.relative:
                shift = damping * tf.cast(self._curvature.mean_eigenvalue(block), tf.float32)
            shifts.update(dict.fromkeys(block.indices.every, shift))
        return shifts

    def _damped(
        self,
        indices: Sequence[int],
        first: Sequence[tf.Tensor],
        second: Sequence[tf.Tensor],
        shifts: Mapping[int, tf.Tensor],
    ) -> tf.Tensor:
        parts = [
            shifts[index] * _dot([a], [b])
            for index, a, b in zip(indices, first, second, strict=True)
        ]
        return tf.reduce_sum(tf.stack(parts))


def check_alone(replicas: int) -> None:
    """Makes sure that there is a single replica, whose batch is all there is.

    Raises:
        ValueError: If there are several.
    """
    if replicas > 1:
        raise ValueError(
            'Argument `step` must be "polyak" where several replicas or workers train. '
            f'Received: step="quadratic" with {replicas} replicas'
        )


def _dot(first: Sequence[tf.Tensor], second: Sequence[tf.Tensor]) -> tf.Tensor:
    """Inner product of two lists of tensors, a float32 scalar."""
    parts = [
        tf.cast(tf.reduce_sum(tf.cast(a, b.dtype) * b), tf.float32)
        for a, b in zip(first, second, strict=True)
    ]
    return tf.reduce_sum(tf.stack(parts))
