"""What is known of loss functions, and what a loss tells of its Fisher matrix.

A loss family is a file in this folder that registers functions of Keras with `register`. Losses
are known by the function that they call, so that a subclass which computes something else
is not taken for its parent.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import tensorflow as tf

from keras_kfc.losses.terms import LossTerm

Options = Mapping[str, Any]


class OutputModel(Protocol):
    """Where the backward passes of one loss term start, `R_e` in `keras_kfc.losses.likelihood`."""

    @property
    def sources(self) -> Sequence[tf.Tensor]:
        """Tensors to start a backward pass from."""

    def sample(self, seed: tf.Tensor) -> list[tf.Tensor]:
        """Derivatives `R z` for a random z with zero mean and unit covariance.

        Args:
            seed: Two integers; the same give the same.

        Returns:
            A tensor for each of `sources`, of its shape and dtype.
        """

    def root_shape(self) -> tf.Tensor:
        """Shape of what R is multiplied with, examples along the first axis."""

    def root_times(self, z: tf.Tensor) -> list[tf.Tensor]:
        """Derivatives `R z`, linear in z, as `sample` returns them.

        Args:
            z: Of the shape `root_shape()`, float32 or float64.
        """

    def count_columns(self) -> tf.Tensor:
        """Number of columns of R for one example, an int32 scalar."""

    def column(self, index: tf.Tensor) -> list[tf.Tensor]:
        """Derivatives for column `index` of R, as `sample` returns them; zeros beyond the last."""


@dataclasses.dataclass(frozen=True)
class Family:
    """The output model of one loss term, and what the user should know of it.

    Args:
        part: The output model.
        note: What the user should know, a sentence without its subject, or an empty string.
        is_empirical: Whether the empirical Fisher matrix takes the place of the asked one.
    """

    part: OutputModel
    note: str = ""
    is_empirical: bool = False


@dataclasses.dataclass(frozen=True)
class LossKind:
    """What is known of one loss function.

    Args:
        family: Makes the family of a term with that loss, from the term and its options.
        lowest: Function from targets and options to the lowest values that the loss can have
            with them; None if it is zero, whatever they are.
        has_lowest: Whether the lowest value is known.
        needs_targets: Whether the family does.
    """

    family: Callable[[LossTerm, Options], Family]
    lowest: Callable[[tf.Tensor, Options], tf.Tensor] | None = None
    has_lowest: bool = True
    needs_targets: bool = True


_KINDS: list[tuple[Any, LossKind]] = []


def register(function: Any, kind: LossKind) -> None:
    """Makes a loss function known.

    Args:
        function: The function of `keras.losses`.
        kind: What is known of it.
    """
    _KINDS.append((function, kind))


def kind_of(function: Any) -> LossKind | None:
    """What is known of a loss function, or None."""
    # Not a mapping: functions of a user's own may not be hashable.
    return next((kind for known, kind in _KINDS if known is function), None)


def known_functions() -> list[Any]:
    """All loss functions that are registered."""
    return [function for function, _ in _KINDS]


def functions_without_targets() -> list[str]:
    """Names of the loss functions whose Fisher matrix does not depend on targets."""
    return sorted(f.__name__ for f, kind in _KINDS if not kind.needs_targets)
