"""What a watched optimizer notes about its steps, inside the traced train step.

The numbers live outside of the optimizer's variables, so that what is saved
does not depend on who watches.
"""

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from keras_kfc.curvature.turns import MOST_GROUPS

_NAMES = ("step_scale", "gradient_norm", "update_norm", "taken_back")
_NEVER = -1


class StepTelemetry:
    """Sums over steps, since the last reset, of a few numbers for each step; and ages.

    The numbers are the part, in [0, 1], of the longest step that is allowed which layers with a
    block took, in the mean over layers, the norms over all variables of the gradients (after
    clipping) and of the changes (with momentum and weight decay), and whether the step was taken
    back. Skipped steps do not count.
    """

    def __init__(self) -> None:
        # May be made while a train step is traced.
        with tf.init_scope():
            self._sums = tf.Variable(tf.zeros((len(_NAMES),)), trainable=False)
            self._steps = tf.Variable(0, trainable=False)
            # The step in which factors moved, and that of each group of inverses.
            never = tf.fill((1 + MOST_GROUPS,), tf.constant(_NEVER, tf.int64))
            self._renewed = tf.Variable(never, trainable=False)

    def observe(
        self,
        step_scale: tf.Tensor,
        gradients: Sequence[tf.Tensor],
        changes: Sequence[tf.Tensor],
        kept: tf.Tensor,
    ) -> None:
        """Adds one step.

        Args:
            step_scale: That part, a scalar.
            gradients: Gradients of all variables.
            changes: Changes of all variables.
            kept: 0 if the step was taken back, else 1.
        """
        scalars = [tf.cast(scalar, tf.float32) for scalar in (step_scale, 1.0 - kept)]
        self._sums.assign_add(tf.stack([scalars[0], _norm(gradients), _norm(changes), scalars[1]]))
        self._steps.assign_add(1)

    def observe_factors(self, step: Any, refused: tf.Tensor) -> None:
        """Notes that factors moved.

        Args:
            step: Number of the step.
            refused: How many layers' could not, so that theirs are as old as they were.
        """
        self._note(0, step, refused)

    def observe_inverses(self, group: int, step: Any, refused: tf.Tensor) -> None:
        """Notes that the inverses of a group of blocks were renewed.

        Args:
            group: Number of the group.
            step: Number of the step.
            refused: How many of them could not be, so that they are as old as they were.
        """
        self._note(1 + group, step, refused)

    def _note(self, place: int, step: Any, refused: tf.Tensor) -> None:
        # What is refused at first is as old as the first try.
        done = tf.equal(refused, 0) | tf.equal(self._renewed, _NEVER)
        here = (tf.range(1 + MOST_GROUPS) == place) & done
        self._renewed.assign(tf.where(here, tf.cast(step, tf.int64), self._renewed))

    def ages(self, step: int) -> dict[str, float]:
        """Steps since all factors moved, and since the oldest inverses were renewed.

        Args:
            step: Number of the step that comes next.

        Returns:
            `factor_age` and `inverse_age`; NaN where that was never seen.
        """
        factors, *inverses = self._renewed.numpy()
        oldest = min((number for number in inverses if number != _NEVER), default=_NEVER)
        return {
            name: float("nan") if last == _NEVER else float(step - last)
            for name, last in (("factor_age", factors), ("inverse_age", oldest))
        }

    def means(self) -> dict[str, float]:
        """The mean of each number over the steps, NaN where there was none."""
        steps = int(self._steps.numpy())
        return {
            name: float(total) / steps if steps else float("nan")
            for name, total in zip(_NAMES, self._sums.numpy(), strict=True)
        }

    def reset(self) -> None:
        """Forgets all steps."""
        self._sums.assign(tf.zeros_like(self._sums))
        self._steps.assign(0)


def watch_steps(optimizer: Any) -> bool:
    """Lets train steps that are traced from now on add to an optimizer's `watched_steps`.

    Returns:
        Whether nobody had asked for it before.
    """
    if optimizer.watched_steps is not None:
        return False
    optimizer.watched_steps = StepTelemetry()
    return True


def _norm(tensors: Sequence[tf.Tensor]) -> tf.Tensor:
    """Norm over all entries of all tensors, float32."""
    norms = [tf.cast(tf.norm(tf.cast(t, tf.float32)), tf.float32) for t in tensors]
    return tf.norm(tf.stack(norms)) if norms else tf.zeros(())
