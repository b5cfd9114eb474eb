"""Blocks of tables that are looked up and used as the output projection, too ("tied" weights).

With the tokens of an example, its hidden vectors `h` and derivatives `Ds` of its logits, the Fisher
block of the table E, `(V, m)`, is that of both uses, taken to be uncorrelated:

    F  =  diag(c) ⊗ Γ  +  diag(q) ⊗ H

    c  how often each token is looked up, and Γ as in `keras_kfc.curvature.diagonal_input`
    q  sum over positions of Ds², mean over examples;  H  mean over positions of  h hᵀ

In logits of many tokens, derivatives of different ones are nearly uncorrelated, so that their
factor may be taken for diagonal. The inverse is that of a single product,

    diag(c + q / s) ⊗ (Γ + s H),    s² = (tr q tr Γ) / (tr c tr H)

where this `s` makes the trace of the additional terms smallest.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from keras_kfc.curvature.api import structure
from keras_kfc.curvature.averaging import store_inverses
from keras_kfc.curvature.diagonal_input import (
    DiagonalInputBlock,
    DiagonalInputRefresh,
    inverses_of,
    table_eigenform,
)
from keras_kfc.curvature.eigenform import Eigenform
from keras_kfc.curvature.shared import TableStructure
from keras_kfc.linalg.precision import at_least_float32
from keras_kfc.linalg.products import gram
from keras_kfc.linalg.stacks import Invert, invert_stacks
from keras_kfc.maps.api import masked, output_factor
from keras_kfc.maps.embedding import EmbeddingMap


@dataclasses.dataclass(frozen=True)
class TiedLayout:
    """What the factors of a tied table are measured from.

    Of its uses, those with integers as inputs look rows up, the others are projections.

    Args:
        linear_map: The table as a linear map.
    """

    linear_map: EmbeddingMap
    use_bias = False
    needs_inputs = True
    symmetric_factors = frozenset({"hidden", "gamma"})

    @property
    def factor_shapes(self) -> dict[str, tuple[int, ...]]:
        """`c`, `H`, `Γ` and `q`."""
        rows, columns = (self.linear_map.inputs,), (1, *[self.linear_map.outputs] * 2)
        return {"counts": rows, "hidden": columns, "gamma": columns, "output_squares": rows}

    @property
    def inverse_shapes(self) -> dict[str, tuple[int, ...]]:
        """The damped inverses of the factors of rows and of columns."""
        shapes = self.factor_shapes
        return {f"{name}_inverse": shapes[name] for name in ("counts", "gamma")}

    def from_inputs(
        self,
        inputs: Sequence[tf.Tensor],
        batch_size: tf.Tensor,
        masks: Sequence[tf.Tensor | None],
    ) -> tuple[tf.Tensor, ...]:
        """`c` and `H` of one batch."""
        counts = tf.zeros(self.factor_shapes["counts"])
        hidden, positions = tf.zeros(self.factor_shapes["hidden"]), tf.zeros(())
        for tensor, mask in zip(inputs, masks, strict=True):
            if tensor.dtype.is_integer:
                counts += self.linear_map.input_counts(tensor, mask)
                continue
            rows = tf.reshape(at_least_float32(masked(tensor, mask)), (1, -1, tensor.shape[-1]))
            hidden += tf.cast(gram(rows), tf.float32)
            counted = tf.shape(rows)[1] if mask is None else tf.math.count_nonzero(mask)
            positions += tf.cast(counted, tf.float32)
        return (
            counts / tf.cast(batch_size, counts.dtype),
            tf.math.divide_no_nan(hidden, positions),
        )

    def from_pass(
        self,
        inputs: Sequence[tf.Tensor],
        derivatives: Sequence[tf.Tensor],
        batch_size: tf.Tensor,
        masks: Sequence[tf.Tensor | None],
    ) -> tuple[tf.Tensor, ...]:
        """`Γ` and `q` of one batch and one backward pass."""
        uses = list(zip(inputs, derivatives, masks, strict=True))
        looked_up = [(ds, mask) for a, ds, mask in uses if a.dtype.is_integer]
        gamma = tf.zeros(self.factor_shapes["gamma"])
        if looked_up:
            parts, own_masks = zip(*looked_up, strict=True)
            gamma = output_factor(self.linear_map, parts, masks=own_masks)
        squares = tf.zeros(self.factor_shapes["output_squares"])
        for a, ds, mask in uses:
            if not a.dtype.is_integer:
                rows = tf.reshape(at_least_float32(masked(ds, mask)), (-1, ds.shape[-1]))
                squares += tf.cast(tf.reduce_sum(tf.square(rows), axis=0), tf.float32)
        return gamma, squares / tf.cast(batch_size, squares.dtype)

    def compromises(self, max_dim: int | None) -> list[str]:
        """None: factors of rows are diagonal, and those of columns as wide as a row."""
        del max_dim
        return []

    def eigenform(self, factors: Sequence[np.ndarray]) -> Eigenform:
        """The single product that takes the place of the sum."""
        rows, columns = _combined(*map(tf.constant, factors))
        return table_eigenform(rows.numpy(), columns.numpy())


class TiedBlock(DiagonalInputBlock):
    """Factors of both uses of a table, and the damped inverses of their sum."""

    layout: TiedLayout  # type: ignore[assignment]

    @property
    def hidden(self) -> tf.Tensor:
        """Moving average of `H`, `(1, m, m)`."""
        return tf.convert_to_tensor(self.state["hidden"])

    @property
    def output_squares(self) -> tf.Tensor:
        """Moving average of `q`, `(V,)`."""
        return tf.convert_to_tensor(self.state["output_squares"])

    def combined(self) -> tuple[tf.Tensor, tf.Tensor]:
        """The factors of rows and of columns of a single product."""
        return _combined(self.counts, self.hidden, self.gamma, self.output_squares)


class TiedRefresh(DiagonalInputRefresh):
    """New inverses of tied tables.

    Args:
        blocks: The blocks.
    """

    _blocks: Sequence[TiedBlock]

    @property
    def trace(self) -> tf.Tensor:
        """`Σ tr c tr Γ + tr q tr H`, a scalar."""
        dtype = max((block.counts.dtype for block in self._blocks), key=lambda dtype: dtype.size)
        total = tf.zeros((), dtype)
        for block in self._blocks:
            for rows, columns in (
                (block.counts, block.gamma),
                (block.output_squares, block.hidden),
            ):
                total += tf.cast(tf.reduce_sum(rows) * tf.linalg.trace(columns)[0], dtype)
        return total

    def run(
        self, damping: tf.Tensor, network_mean: tf.Tensor | None, invert: Invert = invert_stacks
    ) -> tf.Tensor:
        """Inverts the factors of all tables."""
        inverses = [
            inverses_of(*block.combined(), damping, network_mean, invert) for block in self._blocks
        ]
        return store_inverses(self._blocks, inverses)


def _combined(
    counts: tf.Tensor, hidden: tf.Tensor, gamma: tf.Tensor, output_squares: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor]:
    rows, columns = tf.reduce_sum(counts), tf.linalg.trace(gamma)[0]
    other_rows = tf.reduce_sum(output_squares)
    other_columns = tf.linalg.trace(hidden)[0]
    ratio = tf.math.divide_no_nan(other_rows * columns, rows * other_columns)
    scale = tf.where(ratio > 0, tf.sqrt(ratio), 1.0)
    return counts + output_squares / scale, gamma + scale * hidden


@structure("tied")
class Tied(TableStructure[TiedLayout]):
    """Factors of a table's two uses, for tables of rows alone."""

    layout_type = TiedLayout
    block_type, refresh_type = TiedBlock, TiedRefresh
