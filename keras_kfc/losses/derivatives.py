"""What the second backward passes of one forward pass start from.

One pass for the sampled and the empirical Fisher matrix and for curvature propagation, one for
each column of the Hessian's root for the exact one.
"""

import dataclasses
import logging
from collections.abc import Callable, Sequence

import tensorflow as tf

from keras_kfc.linalg.precision import at_least_float32
from keras_kfc.losses.api import OutputModel
from keras_kfc.losses.empirical import EmpiricalDerivatives, with_random_signs
from keras_kfc.losses.families import family_of
from keras_kfc.losses.signs import random_signs
from keras_kfc.losses.terms import LossTerm

FISHERS = ("sampled", "curvature_propagation", "empirical", "exact")

_logger = logging.getLogger("keras_kfc")


@dataclasses.dataclass
class OutputDerivatives:
    """What to start the second backward passes of one forward pass from.

    Args:
        sources: Output tensors.
        count: Number of backward passes, a Python integer or a scalar tensor.
        derivatives: Function from the number of the pass to a tensor for each source.
        notes: Sentences about losses whose Fisher matrix is not, or may not be, what was asked
            for.
        is_empirical: Whether a loss has the empirical Fisher matrix for sure.
    """

    sources: list[tf.Tensor]
    count: int | tf.Tensor
    derivatives: Callable[[tf.Tensor], list[tf.Tensor]]
    notes: Sequence[str] = ()
    is_empirical: bool = False

    def log_notes(self) -> bool:
        """Logs the notes in one line; returns whether there were any."""
        return log_notes(self.notes, self.is_empirical)


def log_notes(notes: Sequence[str], is_empirical: bool) -> bool:
    """Logs what the user should know of some losses in one line; returns whether there is any.

    Args:
        notes: Sentences without their subject.
        is_empirical: Whether a loss has the empirical Fisher matrix for sure.
    """
    if notes:
        level = logging.WARNING if is_empirical else logging.INFO
        _logger.log(level, "KFC %s.", "; it ".join(notes))
    return bool(notes)


def output_derivatives(
    terms: Sequence[LossTerm], fisher: str, seed: tf.Tensor
) -> OutputDerivatives:
    """Output derivatives of all loss terms of a model for one kind of Fisher matrix.

    A term whose loss has no known Fisher matrix has the empirical one; `notes` tell.

    Args:
        terms: The model's loss terms; draws for different terms are independent.
        fisher: One of `FISHERS`.
        seed: Two integers. For `"exact"` they give each example a random sign in each
            backward pass: what a layer that looks at the whole batch (a batch
            normalisation) makes of other examples then adds up as between the independent
            draws of `"sampled"`, and for all other layers signs square away.

    Returns:
        An `OutputDerivatives`; Gamma is the sum over its backward passes.

    Raises:
        ValueError: If a term has no targets and `fisher` needs them for its loss.
    """
    if fisher == "empirical":
        empirical = [EmpiricalDerivatives(term) for term in terms]
        return OutputDerivatives(
            [source for part in empirical for source in part.sources],
            1,
            lambda _: [tensor for part in empirical for tensor in part.derivatives()],
        )
    families = [family_of(term) for term in terms]
    parts = [family.part for family in families]
    sources = [source for part in parts for source in part.sources]
    notes = list(dict.fromkeys(family.note for family in families if family.note))
    is_empirical = any(family.is_empirical for family in families)

    def seed_of(number: int, index: int | tf.Tensor = 0) -> tf.Tensor:
        # The second entry counts steps: draws of one step must not return in the next.
        column = tf.cast(index, seed.dtype) * (1 << 32)
        return seed + tf.stack([tf.constant(number << 32, seed.dtype), column])

    if fisher != "exact":
        draw = _drawn if fisher == "sampled" else _propagated
        return OutputDerivatives(
            sources,
            1,
            lambda _: [
                tensor
                for number, part in enumerate(parts)
                for tensor in draw(part, seed_of(number))
            ],
            notes,
            is_empirical,
        )
    counts = [part.count_columns() for part in parts]

    def columns(index: tf.Tensor) -> list[tf.Tensor]:
        tensors, first = [], 0
        for number, (part, count) in enumerate(zip(parts, counts, strict=True)):
            # Outside of the part's own range the one-hot choice is all zeros.
            column = part.column(tf.cast(index, tf.int32) - first)
            tensors += with_random_signs(column, seed_of(number, index))
            first += count
        return tensors

    return OutputDerivatives(sources, tf.add_n(counts), columns, notes, is_empirical)


def _drawn(part: OutputModel, seed: tf.Tensor) -> list[tf.Tensor]:
    return part.sample(seed)


def _propagated(part: OutputModel, seed: tf.Tensor) -> list[tf.Tensor]:
    """`R z` for independent random signs z (Martens, Sutskever & Swersky 2012)."""
    dtype = at_least_float32(part.sources[0]).dtype
    return part.root_times(random_signs(part.root_shape(), seed, dtype))
