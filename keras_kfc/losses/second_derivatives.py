"""Families of losses by automatic differentiation, and the empirical one where that fails."""

from collections.abc import Callable

from keras_kfc.losses.api import Family, Options
from keras_kfc.losses.elements import LARGEST_BLOCK, ElementwiseView
from keras_kfc.losses.empirical import EmpiricalDerivatives
from keras_kfc.losses.output_hessian import (
    OutputHessian,
    checked_root,
    diagonal_root,
    whole_root,
)
from keras_kfc.losses.terms import LossTerm


def by_diagonal(in_logits: bool = False) -> Callable[[LossTerm, Options], Family]:
    """Of sums or means over an axis of functions of one output each.

    Args:
        in_logits: Whether the loss is one of probabilities, which bends in logits as
            cross-entropies do.
    """

    def family(term: LossTerm, options: Options) -> Family:
        view = ElementwiseView(term, _axes(options), in_logits)
        return Family(OutputHessian(view, diagonal_root(view))) if view.aligned else unaligned(term)

    return family


def by_block(in_logits: bool = False) -> Callable[[LossTerm, Options], Family]:
    """Of functions of one element's outputs.

    Args:
        in_logits: As of `by_diagonal`.
    """

    def family(term: LossTerm, options: Options) -> Family:
        view = ElementwiseView(term, _axes(options), in_logits)
        if not view.aligned:
            return unaligned(term)
        if view.size is None or view.size > LARGEST_BLOCK:
            return empirical(term, f"depends on more than {LARGEST_BLOCK} outputs at once")
        return Family(OutputHessian(view, whole_root(view)))

    return family


def by_checks(term: LossTerm) -> Family:
    """Of a function that nothing is known of, such as a user's own."""
    view = ElementwiseView(term, None, None)
    if not view.aligned:
        return unaligned(term)
    large = view.size is None or view.size > LARGEST_BLOCK
    kind = "outputs" if large else "different examples or positions"
    return Family(
        OutputHessian(view, checked_root(view)),
        f'takes the Fisher matrix of loss="{term.name}" from its second derivatives in the '
        f"model's outputs, and the empirical Fisher matrix in batches where {kind} depend on "
        "one another",
    )


def empirical(term: LossTerm, reason: str) -> Family:
    """The empirical Fisher matrix, and why."""
    return Family(
        EmpiricalDerivatives(term),
        f'uses the empirical Fisher matrix for loss="{term.name}", which {reason}',
        True,
    )


def unaligned(term: LossTerm) -> Family:
    """The empirical Fisher matrix of a loss whose values belong to no single examples."""
    return empirical(term, "does not have a value for each example")


def _axes(options: Options) -> list[int] | None:
    axes = options.get("axis")
    return [axes] if isinstance(axes, int) else axes
