"""Checks of the optimizer's arguments, with messages in Keras's style."""

import contextlib
import math
import numbers
import operator
from collections.abc import Mapping
from typing import Any

_LARGEST = 3e38


def check_number(
    name: str, value: Any, low: float, high: float = _LARGEST, exclude_low: bool = False
) -> float:
    """Requires a real number in `[low, high)`, or in `(low, high)`.

    Args:
        name: The argument's name, for the message.
        value: What was received.
        low: Lower bound.
        high: Upper bound, never included. Defaults to what float32 can hold.
        exclude_low: Whether `low` itself is refused.

    Returns:
        The number as a float.

    Raises:
        TypeError: If `value` is not a real number.
        ValueError: If it is out of range or NaN.
    """
    expected = f"a number in {'(' if exclude_low else '['}{low:g}, {high:g})"
    number: float | None = None
    if not isinstance(value, (bool, str, bytes)):
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        except (TypeError, ValueError):
            number = None
    if number is None:
        raise TypeError(f"Argument `{name}` must be {expected}. Received: {name}={value!r}")
    if not low <= number < high or (exclude_low and number == low):
        raise ValueError(f"Argument `{name}` must be {expected}. Received: {name}={value!r}")
    return number


def check_positive_integer(name: str, value: Any) -> int:
    """Requires an integer of at least 1.

    Raises:
        TypeError: If `value` is not an integer.
        ValueError: If it is below 1.
    """
    number = _integer(value)
    if number is None:
        raise TypeError(f"Argument `{name}` must be a positive integer. Received: {name}={value!r}")
    if number < 1:
        raise ValueError(
            f"Argument `{name}` must be a positive integer. Received: {name}={value!r}"
        )
    return number


def check_boolean(name: str, value: Any) -> bool:
    """Requires True or False.

    Raises:
        TypeError: If `value` is anything else.
    """
    if not isinstance(value, bool):
        raise TypeError(f"Argument `{name}` must be a boolean. Received: {name}={value!r}")
    return value


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> str:
    """Requires one of a few strings.

    Raises:
        ValueError: If `value` is not one of `choices`.
    """
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"Argument `{name}` must be one of {choices}. Received: {name}={value!r}")
    return value


def check_seed(value: Any) -> int | None:
    """Requires None or an integer in `[0, 2**31)`.

    Raises:
        TypeError: If `value` is neither None nor an integer.
        ValueError: If it is out of range.
    """
    if value is None:
        return None
    number = _integer(value)
    if number is None:
        raise TypeError(f"Argument `seed` must be an integer or None. Received: seed={value!r}")
    if not 0 <= number < 2**31:
        raise ValueError(f"Argument `seed` must be in [0, 2**31). Received: seed={value!r}")
    return number


def _integer(value: Any) -> int | None:
    """An integer of any kind as an `int`, None for everything else."""
    if not isinstance(value, bool):
        with contextlib.suppress(TypeError):
            return operator.index(value)
    return None


def check_base_arguments(arguments: Mapping[str, Any]) -> None:
    """Checks the arguments that all Keras optimizers take, as far as Keras does not.

    Args:
        arguments: Their values by name.

    Raises:
        TypeError: If one is of another type than it should be.
        ValueError: If one is out of range.
    """
    learning_rate = arguments["learning_rate"]
    # Schedules, callables and what is none of these are left to Keras.
    if isinstance(learning_rate, numbers.Real):
        check_number("learning_rate", learning_rate, 0)
    for name in ("clipnorm", "clipvalue", "global_clipnorm", "loss_scale_factor"):
        if arguments[name] is not None:
            check_number(name, arguments[name], 0, exclude_low=True)
    if arguments["weight_decay"] is not None:
        check_number("weight_decay", arguments["weight_decay"], 0)
    check_boolean("use_ema", arguments["use_ema"])
    check_number("ema_momentum", arguments["ema_momentum"], 0, 1)
    for name in ("ema_overwrite_frequency", "gradient_accumulation_steps"):
        if arguments[name] is not None:
            check_positive_integer(name, arguments[name])
