"""Blocks that keep averages over batches, and inverses of them: what all structures share."""

from collections.abc import Callable, Sequence

import keras
import numpy as np
import tensorflow as tf

from keras_kfc.curvature.api import BlockLayout
from keras_kfc.linalg.precision import all_finite
from keras_kfc.placement.averages import WeightedVariables


class AveragedBlock:
    """The variables of one layer's block.

    Args:
        path: Path of the layer, for names and messages.
        layout: What the block keeps.
        kernel: Index of the kernel among the optimizer's trainable variables.
        bias: Index of the bias, or None.
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
        kernel: int,
        bias: int | None,
        dtype: str,
        add_variable: Callable[..., keras.Variable],
    ):
        self.path = path
        self.layout = layout
        self.kernel_index = kernel
        self.bias_index = bias

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
    def state(self) -> dict[str, keras.Variable]:
        """All variables of the block, by what they are for."""
        scalars = {"weight": self.ema_weight, "inverted": self.has_inverses}
        return {**self._factors, **self._inverses, **self._basis, **scalars}

    @property
    def measured(self) -> BlockLayout:
        """What to measure of a batch: the layout, which may know more now than at first."""
        return self.layout

    def update(
        self,
        moments: Sequence[tf.Tensor],
        examples: tf.Tensor,
        decay: tf.Tensor,
        batch_is_finite: tf.Tensor,
    ) -> tf.Tensor:
        """Moves the averages towards the moments of one batch.

        Every example counts alike, whatever batch it came in. The first batch counts in full,
        so that the average is usable from the start. Moments that hold a NaN or an
        infinity are left out.

        Args:
            moments: A tensor for each factor.
            examples: Number of examples that they are means over, a scalar.
            decay: What is left of the weight of former batches, a scalar in [0, 1].
            batch_is_finite: Whether the batch may be used at all, a boolean scalar.

        Returns:
            Whether the batch was left out, a boolean scalar.
        """
        usable = batch_is_finite & all_finite(list(moments))
        examples = tf.cast(examples, self.ema_weight.dtype)
        weight = tf.cast(decay, self.ema_weight.dtype) * self.ema_weight + examples
        rate = tf.where(usable, tf.math.divide_no_nan(examples, weight), 0.0)
        # A rate of 0 costs less than a branch of the graph for each block.
        for average, batch in zip(self._factors.values(), moments, strict=True):
            change = tf.cast(batch, average.dtype) - average.value
            average.value.assign_add(tf.math.multiply_no_nan(change, rate))
        self.ema_weight.assign(tf.where(usable, weight, self.ema_weight))
        return ~usable

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

    def store_inverses(self, inverses: Sequence[tf.Tensor]) -> tf.Tensor:
        """Takes over new inverses, or keeps the last good ones.

        Args:
            inverses: A tensor for each inverse, in their order.

        Returns:
            Whether the inverses were refused because they hold a NaN or an
            infinity though the block has seen data, a boolean scalar.
        """
        has_data = self.ema_weight > 0
        usable = all_finite(list(inverses)) & has_data
        for variable, new in zip(self._inverses.values(), inverses, strict=True):
            variable.assign(tf.where(usable, new, variable))
        self.has_inverses.assign(
            tf.where(usable, tf.ones((), self.has_inverses.dtype), self.has_inverses)
        )
        return has_data & ~usable
