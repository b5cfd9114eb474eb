"""A table of rows, looked up by number, as a linear map of vectors with a single one.

The input of a position with token `v` is the unit vector `e_v`, and `Ω`, the sum of their outer
products, is diagonal: it counts tokens.
"""

import dataclasses

import tensorflow as tf

from keras_kfc.linalg.precision import at_least_float32
from keras_kfc.linalg.products import gram, sum_of_rows


@dataclasses.dataclass(frozen=True)
class EmbeddingMap:
    """How the tensors of `keras.layers.Embedding` map to its table.

    Inputs are integers, `(B, ...)`; a bias there is none.

    Args:
        inputs: Number of tokens, V.
        outputs: Size of a row.
    """

    inputs: int
    outputs: int
    groups: int = dataclasses.field(default=1, init=False)
    keeps_positions: bool = dataclasses.field(default=False, init=False)

    @property
    def kernel_rows(self) -> int:
        """Number of tokens."""
        return self.inputs

    def input_counts(self, inputs: tf.Tensor, mask: tf.Tensor | None) -> tf.Tensor:
        """The diagonal of the sum of `a aᵀ`: how often each token is there, `(V,)`.

        Args:
            inputs: Tokens.
            mask: Which of them count, booleans of the same shape, or None for all.
        """
        tokens = tf.reshape(inputs, (-1,))
        counted = tf.ones_like(tokens, tf.bool) if mask is None else tf.reshape(mask, (-1,))
        return tf.math.unsorted_segment_sum(tf.cast(counted, tf.float32), tokens, self.inputs)

    def input_moments(self, inputs: tf.Tensor, parts: int = 1) -> tuple[tf.Tensor, tf.Tensor]:
        """Sums of `a aᵀ` and `a`, `(1, V, V)` and `(1, V)`: for tests and small tables."""
        del parts  # a diagonal matrix is not cut
        rows = self.input_rows(inputs)
        return gram(rows), sum_of_rows(rows)

    def input_rows(self, inputs: tf.Tensor) -> tf.Tensor:
        """The unit vectors, `(1, positions of all examples, V)`: for tests and small tables."""
        return tf.one_hot(tf.reshape(inputs, (1, -1)), self.inputs)

    def count_positions(self, inputs: tf.Tensor) -> tf.Tensor:
        """Number of positions of all examples together, a scalar."""
        return tf.size(inputs)

    def derivative_rows(self, derivatives: tf.Tensor) -> tf.Tensor:
        """Flattens `(B, ..., I)` to `(1, positions of all examples, I)`."""
        return tf.reshape(at_least_float32(derivatives), (1, -1, self.outputs))

    def stack_bias(self, kernel: tf.Tensor, bias: tf.Tensor | None) -> tf.Tensor:
        """The table as `(1, V, I)`."""
        del bias
        return tf.expand_dims(kernel, 0)

    def unstack_bias(self, weights: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor | None]:
        """`(1, V, I)` as the table, and None."""
        return tf.squeeze(weights, 0), None
