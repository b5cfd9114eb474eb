"""The Fisher block of each group of a layer's channels as a whole matrix.

For layers whose groups have few weights: scale and shift of a channel, the kernel of a depthwise
convolution. With `D_b` the derivative of one example's loss with regard to the `k = n m` weights
of a group, the block keeps `E[D_b D_bᵀ]`, the definition of the Fisher matrix with nothing
approximated, and its damped inverse is `(E[D_b D_bᵀ] + λ)⁻¹`. Groups are taken to be
uncorrelated, and so are several uses of a layer in one forward pass. For scale and shift this is
the "unit-wise" block of Osawa et al. (2019, "Large-scale distributed second-order optimization
using Kronecker-factored approximate curvature").
"""

from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from keras_kfc.curvature.api import structure
from keras_kfc.curvature.averaging import AveragedBlock, store_inverses
from keras_kfc.curvature.eigenform import Eigenform, eigenvectors_of
from keras_kfc.curvature.shared import BlockStructure, LayoutOfExamples
from keras_kfc.linalg.damping import concat, sums_of
from keras_kfc.linalg.stacks import Invert, invert_stacks
from keras_kfc.maps.api import LinearMap


class FullLayout(LayoutOfExamples):
    """What the Fisher matrices of one layer's groups are measured from."""

    symmetric_factors = frozenset({"full"})

    @property
    def _shape(self) -> tuple[int, int, int]:
        groups, rows, columns = self.weights_shape
        return (groups, rows * columns, rows * columns)

    @property
    def factor_shapes(self) -> dict[str, tuple[int, int, int]]:
        """Shape of the matrices, `(G, k, k)`."""
        return {"full": self._shape}

    @property
    def inverse_shapes(self) -> dict[str, tuple[int, int, int]]:
        """Shape of their damped inverses, likewise."""
        return {"full_inverse": self._shape}

    def eigenform(self, factors: Sequence[np.ndarray]) -> Eigenform:
        """The matrices of all groups."""
        values, vectors = eigenvectors_of(factors[0])
        return Eigenform(self.weights_shape, values[:, :, None], vectors)

    def sum_over_examples(self, inputs: tf.Tensor, derivatives: tf.Tensor) -> tf.Tensor:
        """Outer products of the derivatives of each example, `(G, k, k)`."""
        gradients = self.example_gradients(inputs, derivatives)
        groups, size, _ = self._shape
        rows = tf.transpose(tf.reshape(gradients, (-1, groups, size)), (1, 0, 2))
        return tf.matmul(rows, rows, transpose_a=True)

    def example_gradients(self, inputs: tf.Tensor, derivatives: tf.Tensor) -> tf.Tensor:
        """Each example's derivative with regard to the weights, `(B, G, n, m)`."""
        quick = getattr(self.linear_map, "example_gradients", None)
        if quick is not None:
            return quick(inputs, derivatives, self.use_bias)
        groups, _, columns = self.weights_shape
        rows = self.rows(inputs)
        shape = (groups, tf.shape(derivatives)[0], -1)
        rows = tf.reshape(rows, (*shape, rows.shape[2]))
        seen = tf.reshape(self.linear_map.derivative_rows(derivatives), (*shape, columns))
        return tf.transpose(tf.matmul(rows, seen, transpose_a=True), (1, 0, 2, 3))


class FullBlock(AveragedBlock):
    """The Fisher matrices of one layer's groups and their damped inverses."""

    layout: FullLayout

    @property
    def full(self) -> tf.Tensor:
        """Moving average of the matrices, `(G, k, k)`."""
        return tf.convert_to_tensor(self.state["full"])

    def multiply(self, weights: tf.Tensor) -> tf.Tensor:
        """The damped inverses times the weights of each group."""
        inverse = tf.convert_to_tensor(self.state["full_inverse"])
        columns = tf.reshape(weights, (*inverse.shape[:2], 1))
        return tf.reshape(inverse @ columns, weights.shape)

    def matrices(self, name: str) -> list[np.ndarray]:
        """The matrices of all groups, or their inverses."""
        return list(self.state[name].numpy())


class FullRefresh:
    """New inverses of whole blocks.

    Args:
        blocks: The blocks.
    """

    def __init__(self, blocks: Sequence[FullBlock]):
        members: dict[tuple[int, str], list[FullBlock]] = {}
        for block in blocks:
            matrices = block.state["full"]
            members.setdefault((matrices.shape[1], matrices.dtype), []).append(block)
        self._blocks = blocks
        self._stacks = [_Stack(own) for own in members.values()]

    @property
    def trace(self) -> tf.Tensor:
        """Sum of the traces of all matrices, a scalar."""
        dtype = max((stack.traces.dtype for stack in self._stacks), key=lambda dtype: dtype.size)
        traces = [tf.cast(tf.reduce_sum(stack.traces), dtype) for stack in self._stacks]
        return tf.reduce_sum(tf.stack(traces))

    @property
    def size(self) -> float:
        """Number of rows of all matrices."""
        return float(sum(stack.sizes.sum() for stack in self._stacks))

    def run(
        self, damping: tf.Tensor, network_mean: tf.Tensor | None, invert: Invert = invert_stacks
    ) -> tf.Tensor:
        """Inverts all matrices, those of a size together; those of a layer share the damping."""
        inverses = invert(
            [stack.matrices for stack in self._stacks],
            [stack.shifts(damping, network_mean) for stack in self._stacks],
        )
        of_block = {
            id(block): part
            for stack, inverse in zip(self._stacks, inverses, strict=True)
            for block, part in zip(stack.blocks, tf.split(inverse, stack.groups), strict=True)
        }
        return store_inverses(self._blocks, [[of_block[id(block)]] for block in self._blocks])


class _Stack:
    """Blocks whose matrices have one size, as one stack: a deep network has many small ones.

    Args:
        blocks: The blocks.

    Attributes:
        matrices: Those of all blocks, `(Σ G, k, k)`.
        groups: G of each block.
        traces: Sum of the traces of the matrices of each block, `(blocks,)`.
        sizes: Number of rows of the matrices of each block together.
    """

    def __init__(self, blocks: Sequence[FullBlock]):
        self.blocks = blocks
        self.matrices = concat([block.full for block in blocks])
        self.groups = [block.full.shape[0] for block in blocks]
        self.sizes = np.array(self.groups) * self.matrices.shape[1]
        self._block_of_group = np.repeat(np.arange(len(blocks)), self.groups)
        places = np.split(np.arange(sum(self.groups)), np.cumsum(self.groups)[:-1])
        self.traces = sums_of(tf.linalg.trace(self.matrices), places)

    def shifts(self, damping: tf.Tensor, network_mean: tf.Tensor | None) -> tf.Tensor:
        """What to add to the diagonals, `(Σ G,)`.

        Relative damping is in units of the mean eigenvalue of all groups of a block together: a
        channel without derivatives is not divided by its rounding errors.
        """
        dtype = self.matrices.dtype
        shift = tf.cast(damping, dtype)
        if network_mean is None:
            return tf.fill((sum(self.groups),), shift)
        means = self.traces / self.sizes.astype(dtype.as_numpy_dtype)
        means = tf.where(means > 0, means, tf.cast(network_mean, dtype))
        return tf.gather(shift * means, self._block_of_group)


@structure("full")
class Full(BlockStructure[FullLayout]):
    """The whole Fisher matrix of each group."""

    block_type, refresh_type = FullBlock, FullRefresh

    def layout(
        self,
        linear_map: LinearMap,
        use_bias: bool,
        max_dim: int | None,
        weight_sharing: str = "expand",
    ) -> FullLayout:
        """Whole matrices.

        Raises:
            ValueError: If they have more rows than the limit.
        """
        del weight_sharing
        layout = FullLayout(linear_map, use_bias)
        size = layout.factor_shapes["full"][1]
        if max_dim is not None and size > max_dim:
            raise ValueError(
                "Argument `structure` must not be 'full' for layers with more weights than "
                f"`max_factor_dim` in a group. Received: {size} weights, "
                f"max_factor_dim={max_dim}. Use 'kronecker' or 'diagonal'."
            )
        return layout
