"""Blocks that keep averages over batches, and inverses of them: what all structures share."""

from collections.abc import Callable, Sequence

import keras
import numpy as np
import tensorflow as tf

from keras_kfc.curvature.api import BlockLayout, CurvatureBlock
from keras_kfc.linalg.precision import all_finite, stacked
from keras_kfc.maps.weights import VariableIndices
from keras_kfc.placement.averages import WeightedVariables


class AveragedBlock:
    """The variables of one layer's block.

    Args:
        path: Path of the layer, for names and messages.
        layout: What the block keeps.
        indices: Where its variables are among the optimizer's trainable ones.
        dtype: Dtype of factors and inverses.
        add_variable: The optimizer's `add_variable`.

    Attributes:
        ema_weight: Number of examples in the moving averages, each with the weight that is left of
            it, a scalar; 0 before the first update.
        has_inverses: 1 once the inverses hold numbers, 0 before.
    """

    def __init__(
        self,
        path: str,
        layout: BlockLayout,
        indices: VariableIndices,
        dtype: str,
        add_variable: Callable[..., keras.Variable],
    ):
        self.path = path
        self.layout = layout
        self.indices = indices

        def add(name: str, shape: tuple[int, ...]) -> keras.Variable:
            full_name = f"{path.replace('/', '_')}_{name}"
            return add_variable(shape=shape, dtype=dtype, name=full_name)

        self._factors = {name: add(name, shape) for name, shape in layout.factor_shapes.items()}
        self._inverses = {name: add(name, shape) for name, shape in layout.inverse_shapes.items()}
        basis = getattr(layout, "basis_shapes", {})
        self._basis = {name: add(name, shape) for name, shape in basis.items()}
        self.ema_weight = add("weight", ())
        self.has_inverses = add("inverted", ())

    @property
    def kernel_index(self) -> int:
        """Index of the kernel by which everybody knows the block."""
        return self.indices.kernels[0]

    @property
    def state(self) -> dict[str, keras.Variable]:
        """All variables of the block, by what they are for."""
        scalars = {"weight": self.ema_weight, "inverted": self.has_inverses}
        return {**self._factors, **self._inverses, **self._basis, **scalars}

    @property
    def measured(self) -> BlockLayout:
        """What to measure of a batch: the layout, which may know more now than at first."""
        return self.layout

    def move(self, moments: Sequence[tf.Tensor], rate: tf.Tensor, weight: tf.Tensor) -> None:
        """Moves the averages towards the moments of a batch; see `move_averages`.

        Args:
            moments: A tensor for each factor; they count for nothing where the rate is 0.
            rate: Part of the way, a scalar.
            weight: What `ema_weight` becomes, a scalar.
        """
        # A rate of 0 costs less than a branch of the graph for each block.
        for average, batch in zip(self._factors.values(), moments, strict=True):
            change = tf.cast(batch, average.dtype) - average.value
            change = tf.math.multiply_no_nan(change, tf.cast(rate, average.dtype))
            average.value.assign_add(change)
        self.ema_weight.assign(weight)

    def matrices(self, name: str) -> list[np.ndarray]:
        """The diagonal blocks of a factor or an inverse; none, unless a structure has matrices."""
        del name
        return []

    def spectra(self, name: str) -> list[np.ndarray]:
        """Eigenvalues of the diagonal blocks of a factor or an inverse; NaN if one is broken."""
        parts = [part.astype("float64") for part in self.matrices(name)]
        return [
            np.linalg.eigvalsh(part) if np.isfinite(part).all() else np.full(len(part), np.nan)
            for part in parts
        ]

    @property
    def averages(self) -> WeightedVariables:
        """The factors, with what a replica's copies of them count.

        A replica that has left out batches has seen less.
        """
        symmetric = [name in self.layout.symmetric_factors for name in self._factors]
        return WeightedVariables(self.ema_weight, list(self._factors.values()), symmetric)

    def store(
        self, inverses: Sequence[tf.Tensor], usable: tf.Tensor, has_inverses: tf.Tensor
    ) -> None:
        """Takes over new inverses, or keeps the old ones; see `store_inverses`.

        Args:
            inverses: A tensor for each inverse, in their order.
            usable: Whether they are to be taken over, a boolean scalar.
            has_inverses: What the variable of this name becomes, a scalar.
        """
        for variable, new in zip(self._inverses.values(), inverses, strict=True):
            variable.assign(tf.where(usable, new, variable))
        self.has_inverses.assign(has_inverses)


def move_averages(
    blocks: Sequence[CurvatureBlock],
    moments: Sequence[Sequence[tf.Tensor]],
    examples: tf.Tensor,
    decay: tf.Tensor,
    batch_is_finite: tf.Tensor,
) -> tf.Tensor:
    """Moves the averages of blocks towards the moments of one batch.

    Every example counts alike, whatever batch it came in. The first batch counts in full,
    so that the average is usable from the start. Moments of a block that hold a NaN or an
    infinity are left out.

    Numbers of all blocks are one vector: a deep network has a hundred blocks, and operations on
    scalars of each would be a tenth of its graph.

    Args:
        blocks: The blocks, at least one.
        moments: For each block a tensor for each factor.
        examples: Number of examples that they are means over, a scalar.
        decay: What is left of the weight of former batches, a scalar in [0, 1].
        batch_is_finite: Whether the batch may be used at all, a boolean scalar.

    Returns:
        Which blocks left the batch out, `(blocks,)`.
    """
    usable = batch_is_finite & tf.stack([all_finite(list(own)) for own in moments])
    before = stacked([block.ema_weight for block in blocks])
    examples = tf.cast(examples, before.dtype)
    after = tf.cast(decay, before.dtype) * before + examples
    rates = tf.where(usable, tf.math.divide_no_nan(examples, after), 0.0)
    weights = tf.where(usable, after, before)
    for block, own, rate, weight in zip(
        blocks, moments, tf.unstack(rates), tf.unstack(weights), strict=True
    ):
        block.move(own, rate, weight)
    return ~usable


def store_inverses(
    blocks: Sequence[AveragedBlock], inverses: Sequence[Sequence[tf.Tensor]]
) -> tf.Tensor:
    """Gives blocks their new inverses, or keeps the last good ones.

    Args:
        blocks: The blocks, at least one.
        inverses: For each block a tensor for each inverse, in their order.

    Returns:
        For which blocks they were refused because they hold a NaN or an
        infinity though the block has seen data, `(blocks,)`.
    """
    has_data = stacked([block.ema_weight for block in blocks]) > 0
    usable = has_data & tf.stack([all_finite(list(own)) for own in inverses])
    before = stacked([block.has_inverses for block in blocks])
    after = tf.where(usable, tf.ones_like(before), before)
    for block, own, taken, has in zip(
        blocks, inverses, tf.unstack(usable), tf.unstack(after), strict=True
    ):
        block.store(own, taken, has)
    return has_data & ~usable
