"""Gradients of tables of which a batch used some rows.

Only these rows and their moments are moved, so that a step takes no longer for a larger table.
"""

import dataclasses
from typing import Any

import tensorflow as tf


@dataclasses.dataclass
class SummedRows:
    """The gradient of some rows of a variable, each row's summed over its uses.

    Made without `tf.unique`, whose size XLA could not know: a row that was used several times
    stands here several times.

    Args:
        indices: `(N,)`, the row of each use.
        values: `(N, ...)`, the sum over all uses of that row, the same for each of them.
        first: `(N,)`, whether a use is the first one of its row.
    """

    indices: tf.Tensor
    values: tf.Tensor
    first: tf.Tensor

    def rows_of(self, variable: Any) -> tf.Tensor:
        """The rows of a variable, `(N, ...)`."""
        return tf.gather(tf.convert_to_tensor(variable), self.indices)

    def once(self, values: tf.Tensor) -> tf.IndexedSlices:
        """Slices to add: values of the first use of each row, zeros for the others."""
        return tf.IndexedSlices(self.of_first_uses(values), self.indices)

    def of_first_uses(self, values: tf.Tensor) -> tf.Tensor:
        """Values of the first use of each row, `(N, ...)`, zeros for the others."""
        shape = tf.concat((tf.shape(self.first), tf.ones(tf.rank(values) - 1, tf.int32)), 0)
        return tf.where(tf.reshape(self.first, shape), values, tf.zeros_like(values))


def summed_rows(gradient: tf.IndexedSlices, rows: int) -> SummedRows:
    """Sums the uses of each row.

    Args:
        gradient: The gradient of a variable that was looked up.
        rows: Number of the variable's rows.
    """
    uses = tf.range(tf.shape(gradient.indices)[0])
    first_use = tf.math.unsorted_segment_min(uses, gradient.indices, rows)
    slot = tf.gather(first_use, gradient.indices)
    totals = tf.math.unsorted_segment_sum(gradient.values, slot, tf.shape(uses)[0])
    return SummedRows(gradient.indices, tf.gather(totals, slot), slot == uses)
