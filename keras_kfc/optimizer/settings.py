"""What the parts of the optimizer read of it: its arguments, its counts, and how it assigns."""

from typing import Any, Protocol

import keras

from keras_kfc.optimizer.telemetry import StepTelemetry


class Settings(Protocol):
    """`keras_kfc.KFC`, as its parts see it. Arguments are described there."""

    name: str
    momentum: float
    nesterov: bool
    norm_constraint: float | None
    fisher: str
    curvature_ema: float
    curvature_update_period: int
    inverse_update_period: int
    relative_damping: bool
    factor_batch_size: int | None
    sharding: str
    step: str
    adam_lr_ratio: float
    weight_decay: float | None
    loss_scale_factor: float | None
    gradient_accumulation_steps: int | None

    draw_seed: keras.Variable
    # Counters, which the parts move.
    skipped_steps: keras.Variable
    rejected_factor_updates: keras.Variable
    rejected_inverse_updates: keras.Variable
    # Sums over steps, where somebody watches; see `keras_kfc.monitor.CurvatureMonitor`.
    watched_steps: StepTelemetry | None

    @property
    def damping(self) -> Any:
        """`λ` of now."""

    @property
    def polyak_scaling(self) -> Any:
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
