"""What the parts of the optimizer read of it: its arguments, its counts, and how it assigns."""

from typing import Any, Protocol

import keras

from keras_kfc.optimizer.telemetry import StepTelemetry


class Settings(Protocol):
    """`keras_kfc.KFC`, as its parts see it. Arguments are described there."""

    name: str
    momentum: float
    nesterov: bool
    kl_clip: float | None
    fisher: str
    factor_decay: float
    factor_update_period: int
    inverse_update_period: int
    scale_free: bool
    factor_samples: int | None
    fallback_lr_ratio: float
    weight_decay: float | None
    loss_scale_factor: float | None
    gradient_accumulation_steps: int | None

    draw_seed: keras.Variable
    # Counters, which the parts move.
    skipped_steps: keras.Variable
    skipped_factor_updates: keras.Variable
    skipped_inverse_updates: keras.Variable
    # Sums over steps, where somebody watches; see `keras_kfc.monitor.CurvatureMonitor`.
    watched_steps: StepTelemetry | None

    @property
    def damping(self) -> Any:
        """`λ` of now."""

    @property
    def polyak(self) -> Any:
        """`c` of now, or None."""

    @property
    def iterations(self) -> Any:
        """Number of steps taken."""

    @property
    def batches(self) -> keras.Variable:
        """Number of batches seen."""

    def may_decay(self, variable: Any) -> bool:
        """Whether nobody has excluded a variable from weight decay."""

    def assign(self, variable: Any, value: Any) -> None:
        """Assigns a tensor or rows to a variable."""

    def assign_add(self, variable: Any, value: Any) -> None:
        """Adds a tensor or rows to a variable."""
