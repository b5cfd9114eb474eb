"""Which Fisher matrix belongs to which loss.

What is known of a loss function (`keras_kfc.losses.api.register`) comes first. Functions that a
user wrote are differentiated twice, and checked on each batch
(`keras_kfc.losses.elements.independent`). What is left has the empirical Fisher matrix.
"""

from keras_kfc.losses.api import Family, functions_without_targets, kind_of
from keras_kfc.losses.second_derivatives import by_checks, empirical
from keras_kfc.losses.terms import LossTerm, known_function


def family_of(term: LossTerm) -> Family:
    """The family of a loss term, for the sampled and the exact Fisher matrix.

    Args:
        term: The loss term.

    Raises:
        ValueError: If the loss needs targets and the term has none.
    """
    function, options = known_function(term.loss)
    kind = kind_of(function)
    if term.y_true is None and (kind is None or kind.needs_targets):
        raise _targets_needed(term)
    try:
        return by_checks(term) if kind is None else kind.family(term, options)
    except LookupError:
        # TensorFlow's error for an operation whose gradient cannot be differentiated.
        return empirical(term, "cannot be differentiated twice")


def _targets_needed(term: LossTerm) -> ValueError:
    known = functions_without_targets()
    return ValueError(
        "Argument `y` is needed for the Fisher matrix of this loss. Without targets it is known "
        f'for {", ".join(known[:-1])} and {known[-1]}. Received: y=None, loss="{term.name}"'
    )
