"""Which Fisher matrix belongs to which loss.

Likelihoods with a name (`keras_kfc.losses.likelihood`) come first, then losses whose Hessian in
the outputs is known to be of some form, then functions that a user wrote, which are checked
on each batch (`keras_kfc.losses.elements.independent`). What is left has the empirical Fisher
matrix. Losses are known by the function that they call, so that a subclass which computes
something else is not taken for its parent.
"""

import dataclasses
from typing import Any

import keras

from keras_kfc.linalg.precision import at_least_float32
from keras_kfc.losses.closed_forms import CLOSED_FORMS, closed_form
from keras_kfc.losses.elements import LARGEST_BLOCK, ElementwiseView
from keras_kfc.losses.empirical import EmpiricalDerivatives
from keras_kfc.losses.likelihood import OutputDistribution, distribution_of
from keras_kfc.losses.output_hessian import (
    OutputHessian,
    checked_root,
    closed_form_root,
    diagonal_root,
    whole_root,
)
from keras_kfc.losses.terms import LossTerm, known_function

# Sums or means over an axis of functions of one output each.
_DIAGONAL: tuple[Any, ...] = (
    keras.losses.mean_absolute_error,
    keras.losses.mean_absolute_percentage_error,
    keras.losses.hinge,
    keras.losses.squared_hinge,
    keras.losses.binary_focal_crossentropy,
)
# Functions of one element's outputs.
_WHOLE: tuple[Any, ...] = (
    keras.losses.categorical_focal_crossentropy,
    keras.losses.categorical_generalized_cross_entropy,
    keras.losses.categorical_hinge,
    keras.losses.cosine_similarity,
    keras.losses.dice,
    keras.losses.tversky,
)
# Losses of probabilities, which bend in logits as cross-entropies do.
_OF_LOGITS: tuple[Any, ...] = (
    keras.losses.binary_focal_crossentropy,
    keras.losses.categorical_focal_crossentropy,
    keras.losses.categorical_generalized_cross_entropy,
)
# Values of one example that depend on all examples, or on too many outputs.
_EMPIRICAL: tuple[Any, ...] = (keras.losses.circle, keras.losses.ctc)


@dataclasses.dataclass
class Family:
    """Where the backward passes of one loss term start.

    Args:
        part: Has `sources`, `sample`, `count_columns` and `column`, as
            `keras_kfc.losses.likelihood.OutputDistribution` has.
        note: What the user should know, a sentence, or an empty string.
        is_empirical: Whether the empirical Fisher matrix takes the place of the asked one.
    """

    part: OutputDistribution | OutputHessian | EmpiricalDerivatives
    note: str = ""
    is_empirical: bool = False


def family_of(term: LossTerm) -> Family:
    """The family of a loss term, for the sampled and the exact Fisher matrix.

    Args:
        term: The loss term.

    Returns:
        A `Family`.

    Raises:
        ValueError: If the loss needs targets and the term has none.
    """
    distribution = distribution_of(term)
    if distribution is not None:
        return Family(distribution)
    function, options = known_function(term.loss)
    known = next((entry for entry in CLOSED_FORMS if function is entry[0]), None)
    if term.y_true is None:
        if known is None or not known[2]:
            raise _targets_needed(term)
        term = dataclasses.replace(term, y_true=term.y_pred)
    if any(function is entry for entry in _EMPIRICAL):
        return _empirical(term, "has values that depend on many outputs at once")
    try:
        return _by_second_derivatives(term, function, options, known)
    except LookupError:
        # TensorFlow's error for an operation whose gradient cannot be differentiated.
        return _empirical(term, "cannot be differentiated twice")


def _by_second_derivatives(term, function, options, known):
    def one_of(functions):
        return any(function is entry for entry in functions)

    diagonal, whole = known is not None or one_of(_DIAGONAL), one_of(_WHOLE)
    axes = options.get("axis") if one_of((*_DIAGONAL, *_WHOLE)) else None
    axes = [axes] if isinstance(axes, int) else axes
    in_logits = one_of(_OF_LOGITS)
    view = ElementwiseView(term, axes, in_logits if diagonal or whole else None)
    if not view.aligned:
        return _empirical(term, "does not have a value for each example")
    if known is not None:
        curvature = closed_form(term, known[1], options, at_least_float32(term.y_pred).dtype)
        if curvature is not None:
            return Family(OutputHessian(view, closed_form_root(view, curvature)))
    if diagonal:
        return Family(OutputHessian(view, diagonal_root(view)))
    if whole:
        if view.size is None or view.size > LARGEST_BLOCK:
            return _empirical(term, f"depends on more than {LARGEST_BLOCK} outputs at once")
        return Family(OutputHessian(view, whole_root(view)))
    large = view.size is None or view.size > LARGEST_BLOCK
    kind = "outputs" if large else "different examples or positions"
    return Family(
        OutputHessian(view, checked_root(view)),
        f'takes the Fisher matrix of loss="{term.name}" from its second derivatives in the '
        f"model's outputs, and the empirical Fisher matrix in batches where {kind} depend on "
        "one another",
    )


def _empirical(term, reason):
    return Family(
        EmpiricalDerivatives(term),
        f'uses the empirical Fisher matrix for loss="{term.name}", which {reason}',
        True,
    )


def _targets_needed(term):
    return ValueError(
        "Argument `y` is needed for the Fisher matrix of this loss. Without targets it is known "
        "for mean_squared_error, binary_crossentropy, categorical_crossentropy, "
        "sparse_categorical_crossentropy, poisson, kl_divergence and "
        f'mean_squared_logarithmic_error. Received: y=None, loss="{term.name}"'
    )
