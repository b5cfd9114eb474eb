"""The Fisher block of one layer by its diagonal: the mean square of each weight's derivative.

Exact on the diagonal, whatever the layer, and nothing beside it. With `D_b = Σ_t ā_t Ds_tᵀ` the
derivative of one example's loss, the block keeps `E[D_b²]` by entries, and its damped inverse is
`1 / (E[D_b²] + λ)`. It takes two numbers for each weight, where Kronecker factors take two for
each pair of inputs and each pair of outputs.

Several uses of a layer in one forward pass are taken to be uncorrelated, as the Kronecker
structure takes them.
"""

from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from keras_kfc.curvature.api import structure
from keras_kfc.curvature.averaging import AveragedBlock, store_inverses
from keras_kfc.curvature.eigenform import Eigenform
from keras_kfc.curvature.shared import BlockStructure, LayoutOfExamples
from keras_kfc.linalg.precision import resolution
from keras_kfc.linalg.stacks import Invert, invert_stacks
from keras_kfc.maps.api import LinearMap

# Bytes of single examples' derivatives, and of what they are made of, that are held at a time.
_SLICE_BYTES = 2**27


class DiagonalLayout(LayoutOfExamples):
    """What the diagonal of one layer's block is measured from."""

    symmetric_factors = frozenset[str]()

    @property
    def factor_shapes(self) -> dict[str, tuple[int, int, int]]:
        """Shape of the diagonal, `(G, n, m)`."""
        return {"diagonal": self.weights_shape}

    @property
    def inverse_shapes(self) -> dict[str, tuple[int, int, int]]:
        """Shape of its damped inverse, likewise."""
        return {"diagonal_inverse": self.weights_shape}

    def eigenform(self, factors: Sequence[np.ndarray]) -> Eigenform:
        """The diagonal, in the basis of the weights."""
        return Eigenform(self.weights_shape, factors[0])

    def sum_over_examples(self, inputs: tf.Tensor, derivatives: tf.Tensor) -> tf.Tensor:
        """`Σ_b (Σ_t ā_bt Ds_btᵀ)²` of one use."""
        if len(inputs.shape) == 2:
            # One position for each example: the square of a product is the product of squares.
            squares = (
                tf.square(self.rows(inputs)),
                tf.square(self.columns(derivatives)),
            )
            return tf.matmul(*squares, transpose_a=True)
        examples = tf.shape(inputs, tf.int64)[0]
        size = tf.maximum(tf.minimum(self._slice_size(inputs, derivatives), examples), 1)
        count = -(-examples // size)

        def slices(tensor: tf.Tensor) -> tf.Tensor:
            # Examples of zeros add nothing.
            missing = [[0, count * size - examples], *[[0, 0]] * (len(tensor.shape) - 1)]
            shape = tf.concat(((count, size), tf.shape(tensor, tf.int64)[1:]), axis=0)
            parts = tf.reshape(tf.pad(tensor, missing), shape)
            return tf.ensure_shape(parts, (None, None, *tensor.shape[1:]))

        all_inputs, all_derivatives = slices(inputs), slices(derivatives)

        def squares_of(number: tf.Tensor) -> tf.Tensor:
            rows = self.rows(all_inputs[number])
            columns = self.columns(all_derivatives[number])
            shape = tf.stack([self.weights_shape[0], size, -1])
            rows, columns = (
                tf.reshape(part, tf.concat((shape, tf.shape(part, tf.int64)[2:]), axis=0))
                for part in (rows, columns)
            )
            return tf.reduce_sum(tf.square(tf.matmul(rows, columns, transpose_a=True)), axis=1)

        _, total = tf.while_loop(
            lambda number, _: number < count,
            lambda number, total: (number + 1, total + squares_of(number)),
            (tf.ones((), tf.int64), squares_of(tf.zeros((), tf.int64))),
            parallel_iterations=1,
        )
        return tf.ensure_shape(total, self.weights_shape)

    def _slice_size(self, inputs: tf.Tensor, derivatives: tf.Tensor) -> tf.Tensor:
        """Number of examples whose derivatives are held at a time."""
        groups, rows, columns = self.weights_shape
        examples = tf.maximum(tf.shape(inputs, tf.int64)[0], 1)
        positions = tf.size(derivatives, tf.int64) // (examples * groups * columns)
        numbers = groups * (rows * columns + positions * (rows + columns))
        return _SLICE_BYTES // (numbers * max(4, derivatives.dtype.size))


class DiagonalBlock(AveragedBlock):
    """The diagonal of one layer's block and its damped inverse."""

    @property
    def diagonal(self) -> tf.Tensor:
        """Moving average of the diagonal, `(G, n, m)`."""
        return tf.convert_to_tensor(self.state["diagonal"])

    def multiply(self, weights: tf.Tensor) -> tf.Tensor:
        """Divides the weights by the damped diagonal."""
        return tf.convert_to_tensor(self.state["diagonal_inverse"]) * weights

    def spectra(self, name: str) -> list[np.ndarray]:
        """The entries, which are the eigenvalues, of each group."""
        return [part.astype("float64").ravel() for part in self.state[name].numpy()]


class DiagonalRefresh:
    """New inverses of diagonals.

    Args:
        blocks: The blocks.
    """

    def __init__(self, blocks: Sequence[DiagonalBlock]):
        self._blocks = blocks
        self._diagonals = [block.diagonal for block in blocks]

    @property
    def trace(self) -> tf.Tensor:
        """Sum of all diagonals, a scalar."""
        dtype = max((part.dtype for part in self._diagonals), key=lambda dtype: dtype.size)
        traces = [tf.cast(tf.reduce_sum(part), dtype) for part in self._diagonals]
        return tf.reduce_sum(tf.stack(traces))

    @property
    def size(self) -> float:
        """Number of entries."""
        return float(sum(part.shape.num_elements() for part in self._diagonals))

    def run(
        self, damping: tf.Tensor, network_mean: tf.Tensor | None, invert: Invert = invert_stacks
    ) -> tf.Tensor:
        """Inverts all diagonals; those of a group share the damping."""
        del invert
        inverses = [
            [damped_inverse_of_diagonal(diagonal, damping, network_mean)]
            for diagonal in self._diagonals
        ]
        return store_inverses(self._blocks, inverses)


def damped_inverse_of_diagonal(
    diagonal: tf.Tensor, damping: tf.Tensor, network_mean: tf.Tensor | None
) -> tf.Tensor:
    """`1 / (d + λ)`, with `λ` in units of the mean of each group if damping is relative.

    Args:
        diagonal: `(G, n, m)`, not negative.
        damping: `λ`, a scalar.
        network_mean: As of `Refresh.run`.
    """
    shift = tf.cast(damping, diagonal.dtype)
    mean = tf.reduce_mean(diagonal, axis=(1, 2), keepdims=True)
    if network_mean is not None:
        shift *= tf.where(mean > 0, mean, tf.cast(network_mean, diagonal.dtype))
    # Less cannot be told from rounding errors of the larger entries.
    smallest = diagonal.dtype.as_numpy_dtype(10 * resolution(diagonal.dtype))
    return 1 / (diagonal + tf.maximum(shift, smallest * mean))


@structure("diagonal")
class Diagonal(BlockStructure[DiagonalLayout]):
    """The diagonal of the Fisher matrix."""

    block_type, refresh_type = DiagonalBlock, DiagonalRefresh

    def layout(
        self,
        linear_map: LinearMap,
        use_bias: bool,
        max_dim: int | None,
        weight_sharing: str = "expand",
    ) -> DiagonalLayout:
        """Two numbers for each weight, whatever the limit."""
        del max_dim, weight_sharing
        return DiagonalLayout(linear_map, use_bias)
