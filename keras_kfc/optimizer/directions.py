"""Preconditioned gradients of all variables with a block, and what the step size asks of them."""

import dataclasses
import functools
import operator
from collections.abc import Container, Mapping, Sequence
from typing import Any

import tensorflow as tf

from keras_kfc.curvature.api import Curvature
from keras_kfc.optimizer.rows import SummedRows
from keras_kfc.passes.products import GradientProduct


@dataclasses.dataclass(frozen=True)
class Directions:
    """`d = F⁻¹ g`.

    Args:
        of: Directions by index of their variable; of tables of which a batch used some rows,
            those of these rows, `(N, ...)`.
        rows: The rows, by index.
        tables: Indices of the tables, also of those whose gradient is not given by rows.
        slopes: `g · d` of the variables of some blocks, by their indices, where that is known
            without the gradient.
    """

    of: Mapping[int, tf.Tensor]
    rows: Mapping[int, SummedRows]
    tables: frozenset[int]
    slopes: Mapping[tuple[int, ...], tf.Tensor] = dataclasses.field(default_factory=dict)

    def __contains__(self, index: int) -> bool:
        return index in self.of

    def __len__(self) -> int:
        return len(self.of)

    def slope(self, gradients: Mapping[int, tf.Tensor], among: Container[int]) -> tf.Tensor:
        """`g · d` over some variables, a float32 scalar.

        Args:
            gradients: The gradients `g` that are not given by rows.
            among: Indices of the variables.
        """
        known = {index for indices in self.slopes for index in indices}
        parts = [tf.zeros(())]
        parts += [tf.cast(own, tf.float32) for i, own in self.slopes.items() if i[0] in among]
        for index, direction in self.of.items():
            if index not in among or index in known:
                continue
            rows = self.rows.get(index)
            own = gradients[index] if rows is None else rows.of_first_uses(rows.values)
            product = tf.reduce_sum(tf.cast(own, direction.dtype) * direction)
            parts.append(tf.cast(product, tf.float32))
        # Not `tf.add_n`: what the graph optimiser makes of it adds in an order that may be another
        # in each process, and workers would part by its rounding.
        return tf.reduce_sum(tf.stack(parts))

    def mean_squares(self, blocks: Sequence[Sequence[int]]) -> tf.Tensor:
        """Mean square of the directions of each block, `(blocks,)`, float32.

        Rows of a table that have no gradient do not count.

        Args:
            blocks: For each block the indices of its variables; 0 where there is none.
        """
        totals: list[tf.Tensor] = []
        counts: list[Any] = []
        for indices in blocks:
            parts = [self._squares(index) for index in indices] or [(tf.zeros(()), 0.0)]
            totals.append(functools.reduce(operator.add, (total for total, _ in parts)))
            counts.append(functools.reduce(operator.add, (count for _, count in parts)))
        total, count = tf.stack(totals), tf.convert_to_tensor(counts, tf.float32)
        return tf.math.divide_no_nan(2 * total, count)

    def _squares(self, index: int) -> tuple[tf.Tensor, Any]:
        """Half the sum of squares of a variable's direction, and of how many entries."""
        direction = tf.cast(self.of[index], tf.float32)
        counted = self.moving_rows(index)
        if index in self.rows:
            counted = self.rows[index].first
            direction = self.rows[index].of_first_uses(direction)
        count: Any = float(direction.shape[-1])
        if counted is None:
            count = float(direction.shape.num_elements())
        else:
            count *= tf.reduce_sum(tf.cast(counted, tf.float32))
        # One operation, where a square and its sum are three.
        return tf.nn.l2_loss(direction), count

    def shortened(
        self, longest: tf.Tensor, blocks: Sequence[Sequence[int]]
    ) -> tuple["Directions", tf.Tensor]:
        """The directions by one factor, with which no block's root mean square is above a bound.

        Args:
            longest: The bound, a scalar.
            blocks: For each block the indices of its variables.

        Returns:
            The directions, and whether any was above the bound.
        """
        lengths = tf.sqrt(self.mean_squares(blocks))
        shares = tf.where(lengths > longest, tf.math.divide_no_nan(longest, lengths), 1.0)
        share = tf.reduce_min(shares)
        of = {i: tf.cast(share, direction.dtype) * direction for i, direction in self.of.items()}
        slopes = {i: tf.cast(share, slope.dtype) * slope for i, slope in self.slopes.items()}
        return dataclasses.replace(self, of=of, slopes=slopes), share < 1

    def moving_rows(self, index: int) -> tf.Tensor | None:
        """Which rows of a table have a gradient, booleans, where that is given for all rows."""
        if index not in self.tables or index in self.rows:
            return None
        return tf.reduce_any(self.of[index] != 0, axis=-1)


def directions_of(
    curvature: Curvature,
    gradients: Mapping[int, tf.Tensor],
    rows: Mapping[int, SummedRows],
    products: Mapping[int, GradientProduct] | None = None,
) -> Directions:
    """Preconditions gradients.

    Args:
        curvature: The curvature.
        gradients: Gradients by index.
        rows: Gradients of tables of which a batch used some rows, by index.
        products: Those of the gradients that are products of two thin matrices.
    """
    tables = curvature.tables
    by_rows = curvature.directions_by_rows(products or {})
    others = {index: part for index, part in gradients.items() if index not in by_rows.of}
    found = curvature.natural_gradient(others) | by_rows.of
    directions = {index: found[index] for index in gradients if index in found}
    for index, part in rows.items():
        if index in tables:
            directions[index] = curvature.direction_of_rows(index, part.values, part.indices)
    return Directions(directions, rows, tables, by_rows.slopes)
