"""Preconditioned gradients of all variables with a block, and what the step size asks of them."""

import dataclasses
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
    """

    of: Mapping[int, tf.Tensor]
    rows: Mapping[int, SummedRows]
    tables: frozenset[int]

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
        parts = [tf.zeros(())]
        for index, direction in self.of.items():
            if index not in among:
                continue
            rows = self.rows.get(index)
            own = gradients[index] if rows is None else rows.of_first_uses(rows.values)
            product = tf.reduce_sum(tf.cast(own, direction.dtype) * direction)
            parts.append(tf.cast(product, tf.float32))
        return tf.add_n(parts)

    def mean_square(self, indices: Sequence[int]) -> tf.Tensor:
        """Over all entries of some variables, a float32 scalar; 0 where there is none.

        Rows of a table that have no gradient do not count.
        """
        if not indices:
            return tf.zeros(())
        totals: list[tf.Tensor] = []
        count: Any = 0
        for index in indices:
            direction = tf.cast(self.of[index], tf.float32)
            counted = self.moving_rows(index)
            if index in self.rows:
                counted = self.rows[index].first
                direction = self.rows[index].of_first_uses(direction)
            if counted is None:
                count += direction.shape.num_elements()
            else:
                count += tf.reduce_sum(tf.cast(counted, tf.float32)) * direction.shape[-1]
            totals.append(tf.reduce_sum(tf.square(direction)))
        if isinstance(count, int):
            return tf.add_n(totals) / count
        return tf.math.divide_no_nan(tf.add_n(totals), count)

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
    directions = curvature.natural_gradient(gradients, products)
    for index, part in rows.items():
        if index in tables:
            directions[index] = curvature.direction_of_rows(index, part.values, part.indices)
    return Directions(directions, rows, tables)
