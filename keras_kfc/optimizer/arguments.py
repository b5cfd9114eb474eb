"""Checks of the arguments that KFC has beside those of every Keras optimizer."""

from collections.abc import Callable, Mapping
from typing import Any

import keras

from keras_kfc.curvature.api import STRUCTURES
from keras_kfc.losses.derivatives import FISHERS
from keras_kfc.maps.sharing import WEIGHT_SHARING
from keras_kfc.passes.capture import Capture
from keras_kfc.utils.arguments import (
    check_boolean,
    check_choice,
    check_number,
    check_positive_integer,
    check_seed,
)


def _number(high: float | None = None, exclude_low: bool = False) -> Callable[[str, Any], float]:
    options = {} if high is None else {"high": high}
    return lambda name, value: check_number(name, value, 0, exclude_low=exclude_low, **options)


def _or_none(check: Callable[[str, Any], Any]) -> Callable[[str, Any], Any]:
    return lambda name, value: None if value is None else check(name, value)


# What replicas share out: nothing, or the work of the first, or of both.
SHARDINGS = ("none", "inverses", "preconditioning")
# Rules of the step size.
STEPS = ("polyak", "quadratic")
# What Keras's own optimizers take, too.
KERAS_ARGUMENTS = (
    "learning_rate",
    "weight_decay",
    "clipnorm",
    "clipvalue",
    "global_clipnorm",
    "use_ema",
    "ema_momentum",
    "ema_overwrite_frequency",
    "loss_scale_factor",
    "gradient_accumulation_steps",
)
# Polyak's scaling where a schedule takes steps back later, and where nothing does.
_SCHEDULED, _CONSTANT = 3.0, 1.0
# `damping` and `polyak_scaling` check themselves, see `keras_kfc.optimizer.hyperparameter`.
CHECKS: Mapping[str, Callable[[str, Any], Any]] = {
    "momentum": _number(high=1),
    "nesterov": check_boolean,
    "norm_constraint": _or_none(_number(exclude_low=True)),
    "fisher": lambda name, value: check_choice(name, value, FISHERS),
    "curvature_ema": _number(high=1),
    "curvature_update_period": check_positive_integer,
    "inverse_update_period": check_positive_integer,
    "relative_damping": check_boolean,
    "factor_batch_size": _or_none(check_positive_integer),
    "structure": lambda name, value: check_choice(name, value, _structures()),
    "weight_sharing": _or_none(lambda name, value: check_choice(name, value, WEIGHT_SHARING)),
    "max_factor_dim": _or_none(check_positive_integer),
    "step": lambda name, value: check_choice(name, value, STEPS),
    "sharding": lambda name, value: check_choice(name, value, SHARDINGS),
    "adam_lr_ratio": _number(),
    "seed": lambda name, value: check_seed(value),
}


# What arguments were called in models of state format 1.
_FORMER_NAMES = {
    "polyak": "polyak_scaling",
    "kl_clip": "norm_constraint",
    "factor_decay": "curvature_ema",
    "factor_update_period": "curvature_update_period",
    "scale_free": "relative_damping",
    "factor_samples": "factor_batch_size",
    "fallback_lr_ratio": "adam_lr_ratio",
}


def under_present_names(config: Mapping[str, Any]) -> dict[str, Any]:
    """A stored configuration, with the names that its arguments have now."""
    return {_FORMER_NAMES.get(name, name): value for name, value in config.items()}


def checked(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments in the types that the optimizer keeps them in.

    Args:
        arguments: All arguments in `CHECKS`, by name.

    Raises:
        TypeError: If one is of another type than it must be.
        ValueError: If one is out of range.
    """
    return {name: check(name, arguments[name]) for name, check in CHECKS.items()}


def check_step(arguments: Mapping[str, Any]) -> None:
    """Checks that steps of a quadratic model get no arguments that they have no use for.

    Raises:
        ValueError: If they do.
    """
    if arguments["step"] != "quadratic":
        return
    for name, why in (("polyak_scaling", "not be None"), ("norm_constraint", "be None")):
        if (arguments[name] is None) == (name == "polyak_scaling"):
            raise ValueError(
                f'Argument `{name}` must {why} for step="quadratic". '
                f"Received: {name}={arguments[name]}"
            )
    if isinstance(arguments["damping"], keras.optimizers.schedules.LearningRateSchedule):
        raise ValueError(
            'Argument `damping` must be a number for step="quadratic", which adapts it. '
            f"Received: damping={arguments['damping']}"
        )


def chosen_scaling(polyak_scaling: Any, learning_rate: Any) -> Any:
    """`polyak_scaling` as it was given, or what suits the learning rate for `"auto"`."""
    if not isinstance(polyak_scaling, str) or polyak_scaling != "auto":
        return polyak_scaling
    scheduled = isinstance(learning_rate, keras.optimizers.schedules.LearningRateSchedule)
    return _SCHEDULED if scheduled else _CONSTANT


def check_forward_pass(built: bool, capture: Any, **needed: Any) -> None:
    """Checks the arguments of `KFC.update_factors`.

    Args:
        built: Whether the optimizer is built.
        capture: What should be a capture.
        **needed: Arguments that must not be None, by name.

    Raises:
        ValueError: If the optimizer is not built, or an argument is None.
        TypeError: If `capture` is something else.
    """
    if not built:
        raise ValueError(
            "The optimizer has no factors yet. Call "
            "`optimizer.build(model.trainable_variables)` before `update_factors`."
        )
    if not isinstance(capture, Capture):
        raise TypeError(
            "Argument `capture` must be the `keras_kfc.Capture` of the forward pass. "
            f"Received: capture={capture!r} of type {type(capture).__name__}"
        )
    for name, given in needed.items():
        if given is None:
            raise ValueError(f"Argument `{name}` is needed. Received: {name}=None")


def _structures() -> tuple[str, ...]:
    """Names of the structures that a user may choose."""
    return tuple(name for name, kind in STRUCTURES.items() if kind.for_any_map)
