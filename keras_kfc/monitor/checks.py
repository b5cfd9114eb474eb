"""What looks wrong in a training, said once each in the log."""

import inspect
import logging
from collections.abc import Callable, Mapping
from typing import Any

import keras
import numpy as np

from keras_kfc._compat.keras_internals import learning_rate_schedule
from keras_kfc.optimizer.kfc import KFC

# Parts of an epoch's steps.
_MANY_SKIPPED, _MANY_TAKEN_BACK = 0.1, 0.1
# Periods.
_OLD = 3
# Epochs in a row, and steps, after which steps as long as the learning rate allows are no start.
_EPOCHS, _START = 3, 200
_AS_LONG_AS_ALLOWED = 0.95
# Below this part of its highest value a schedule has ended, and above it has not changed.
_ENDED, _SAME = 1e-3, 0.99
_USUAL_RATE = inspect.signature(KFC).parameters["learning_rate"].default
_logger = logging.getLogger("keras_kfc")


class RunChecks:
    """Looks at a training's numbers.

    Args:
        optimizer: The `keras_kfc.KFC`.
    """

    def __init__(self, optimizer: Any):
        self._optimizer = optimizer
        self._told: set[str] = set()
        self._epochs_at_the_bound = 0
        self._skipped = self._skipped_steps()

    def check_schedules(self, steps: int | None) -> None:
        """Says if a schedule does nothing in this training, or ends it early.

        Args:
            steps: Steps that the training will take, or None if nobody knows.
        """
        if not steps:
            return
        first = int(self._optimizer.iterations.numpy())
        for name, schedule in _schedules(self._optimizer).items():
            values = [_value(schedule, first + part * steps // 8) for part in range(9)]
            if not np.isfinite(values).all():
                continue
            if min(values) >= _SAME * max(values):
                self._tell(
                    f"{name} never acts",
                    "The schedule of `%s` changes by less than 1%% in the %d steps of this "
                    "training: it was made for more of them, or for fewer that are over.",
                    name,
                    steps,
                )
            elif name == "learning_rate" and max(values[4:]) <= _ENDED * max(values):
                self._tell(
                    f"{name} ends",
                    "The schedule of `%s` is at an end before half of the %d steps of this "
                    "training: the others will hardly change the weights.",
                    name,
                    steps,
                )

    def check_epoch(self, steps: int, values: Mapping[str, float]) -> None:
        """Says what looks wrong in an epoch.

        Args:
            steps: Number of its steps, those that were skipped among them.
            values: What the monitor logs.
        """
        before, self._skipped = self._skipped, self._skipped_steps()
        skipped = self._skipped - before
        if skipped > _MANY_SKIPPED * max(1, steps):
            self._tell(
                "skipped",
                "KFC left out %d of the %d steps of an epoch, because gradients were not finite. "
                "Look at the data, and at logarithms and divisions in the model.",
                skipped,
                steps,
            )
        if values.get("steps_taken_back", 0.0) > _MANY_TAKEN_BACK:
            self._tell(
                "taken back",
                "KFC took back %.0f%% of the steps of an epoch, because they made the loss of "
                'their batch worse. Larger batches help, or `step="polyak"`.',
                100 * values["steps_taken_back"],
            )
        self._check_ages(values)
        self._check_bound(values)

    def _check_ages(self, values: Mapping[str, float]) -> None:
        periods = {
            "factor": self._optimizer.curvature_update_period,
            "inverse": self._optimizer.inverse_update_period,
        }
        for what, period in periods.items():
            age = values[f"{what}_age"]
            if age > _OLD * period:
                self._tell(
                    f"old {what}",
                    "The %ss of some layers are %d steps old, though new ones are due every %d: "
                    "they were not finite, which `rejected_%s_updates` counts.",
                    what,
                    int(age),
                    period,
                    what,
                )

    def _check_bound(self, values: Mapping[str, float]) -> None:
        at_the_bound = values["step_scale"] > _AS_LONG_AS_ALLOWED
        self._epochs_at_the_bound = self._epochs_at_the_bound + 1 if at_the_bound else 0
        small = 0 < values["learning_rate"] < _USUAL_RATE
        steps = int(self._optimizer.iterations.numpy())
        bounded = self._optimizer.blocks and self._optimizer.polyak_scaling is not None
        if bounded and small and self._epochs_at_the_bound >= _EPOCHS and steps >= _START:
            self._tell(
                "bound",
                "All steps of KFC are as long as `learning_rate=%g` allows. It is a bound, and "
                "not a pace: leave it at its default of %g, unless that is unstable.",
                values["learning_rate"],
                _USUAL_RATE,
            )

    def _skipped_steps(self) -> int:
        return int(self._optimizer.skipped_steps.numpy())

    def _tell(self, what: str, text: str, *values: Any) -> None:
        if what not in self._told:
            self._told.add(what)
            _logger.warning(text, *values)


def _schedules(optimizer: Any) -> dict[str, Callable[[int], Any]]:
    """The schedules among an optimizer's settings."""
    held = {
        "learning_rate": learning_rate_schedule(optimizer),
        "damping": KFC.damping.held_by(optimizer),
        "polyak_scaling": KFC.polyak_scaling.held_by(optimizer),
    }
    schedule = keras.optimizers.schedules.LearningRateSchedule
    return {name: value for name, value in held.items() if isinstance(value, schedule)}


def _value(schedule: Callable[[int], Any], step: int) -> float:
    return float(keras.ops.convert_to_numpy(schedule(step)))
