"""What the optimizer tells its user, once each, in the log."""

import logging
import math
from collections.abc import Sequence, Set
from typing import Any

import keras

from keras_kfc._compat.keras_internals import own_trainable_variables
from keras_kfc.curvature.block_diagonal import BlockDiagonal
from keras_kfc.layers.instrumented import capturing_class_of, is_excluded, layers_with_reasons
from keras_kfc.losses.derivatives import OutputDerivatives

# Share of parameters with a block below which a line says so.
_SMALL_SHARE = 0.5
_logger = logging.getLogger("keras_kfc")


class Notices:
    """What has been told already.

    Attributes:
        told_of: Indices of kernels that a line has told of, though their blocks could not go.
    """

    def __init__(self) -> None:
        self._told_of_fisher = False
        self._told_of_coverage = False
        self.told_of: frozenset[int] = frozenset()

    def tell_notes(self, derivatives: OutputDerivatives) -> None:
        """Logs what is to be known of a loss's Fisher matrix."""
        self._told_of_fisher = self._told_of_fisher or derivatives.log_notes()

    def tell_empirical(self, model: Any) -> None:
        """Says that a train step hides its loss, so that only the empirical matrix is to be had."""
        if self._told_of_fisher:
            return
        self._told_of_fisher = True
        _logger.warning(
            "KFC uses the empirical Fisher matrix, because %s is trained without its "
            "compiled loss, so that the model's own distribution is not known. On "
            'regression this can diverge where fisher="sampled" does not. Let the train '
            "step call the whole model and `compute_loss`, or use `keras_kfc.Capture` in it.",
            type(model).__name__,
        )

    def tell_coverage(
        self,
        curvature: BlockDiagonal,
        variables: Sequence[Any],
        left_out: Set[int],
        model: keras.Model | None,
    ) -> None:
        """Says if layers that could have a block have none, and nobody asked for that.

        Args:
            curvature: The optimizer's curvature.
            variables: Its trainable variables.
            left_out: Indices of kernels without a block for want of statistics, which another
                line has told of.
            model: The model, if it is known.
        """
        if self._told_of_coverage:
            return
        self._told_of_coverage = True
        if not curvature.blocks:
            if not left_out:
                _logger.warning(
                    "KFC found no layer with a block: its fallback rule, an Adam, trains "
                    "everything. Call `keras_kfc.instrument(model)` before training, or build the "
                    "model from `keras_kfc.layers`."
                )
            return
        _tell_share(curvature, variables)
        if model is not None:
            _tell_plain_layers(model)


def share_with_block(curvature: BlockDiagonal, variables: Sequence[Any]) -> float:
    """The part of the parameters that have a block, in [0, 1]."""
    sizes = [math.prod(variable.shape) for variable in variables]
    return sum(sizes[index] for index in curvature.covered) / max(1, sum(sizes))


def _tell_share(curvature: BlockDiagonal, variables: Sequence[Any]) -> None:
    """Says if most of the parameters have no block."""
    share = share_with_block(curvature, variables)
    if share < _SMALL_SHARE:
        _logger.warning(
            "%.1f%% of the parameters have a block. The fallback rule of KFC, an "
            "Adam, trains the others; `print(keras_kfc.coverage(model))` tells which.",
            100 * share,
        )


def _tell_plain_layers(model: keras.Model) -> None:
    """Says which layers could have a block, but are not instrumented."""
    plain = [
        layer.path
        for layer, reason in layers_with_reasons(model)
        if capturing_class_of(type(layer))
        and own_trainable_variables(layer)
        and not (reason or is_excluded(layer))
    ]
    if plain:
        _logger.warning(
            "The fallback rule of KFC trains %d layers that could have a block, "
            "but are not instrumented: %s. Call `keras_kfc.instrument(model)` on the whole "
            "model, before it is compiled, or name them in its `exclude`.",
            len(plain),
            ", ".join(plain),
        )
