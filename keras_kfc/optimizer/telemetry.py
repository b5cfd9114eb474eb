"""What a watched optimizer notes about its steps, inside the traced train step.

The numbers live outside of the optimizer's variables, so that what is saved
does not depend on who watches.
"""

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

_NAMES = ("step_scale", "gradient_norm", "update_norm")


class StepTelemetry:
    """Sums over steps, since the last reset, of three numbers for each step.

    They are the part, in [0, 1], of the longest step that is allowed which layers with a block
    took, in the mean over layers, and the norms over all variables of the gradients (after
    clipping) and of the changes (with momentum and weight decay). Skipped steps do not count.
    """

    def __init__(self) -> None:
        # May be made while a train step is traced.
        with tf.init_scope():
            self._sums = tf.Variable(tf.zeros((len(_NAMES),)), trainable=False)
            self._steps = tf.Variable(0, trainable=False)

    def observe(
        self, step_scale: tf.Tensor, gradients: Sequence[tf.Tensor], changes: Sequence[tf.Tensor]
    ) -> None:
        """Adds one step.

        Args:
            step_scale: That part, a scalar.
            gradients: Gradients of all variables.
            changes: Changes of all variables.
        """
        step_scale = tf.cast(step_scale, tf.float32)
        self._sums.assign_add(tf.stack([step_scale, _norm(gradients), _norm(changes)]))
        self._steps.assign_add(1)

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
