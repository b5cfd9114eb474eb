"""Preconditioning the rows of a gradient instead of the gradient.

With a gradient `D = Aᵀ E` of R rows, `Ω⁻¹ D Γ⁻¹ = L N` with `L = Ω⁻¹ Aᵀ` and `N = E Γ⁻¹`, exactly.
The left side takes `n m (n + m)` products, the right side `R (n² + m² + n m)`: less where R is
small against n and m, as in wide layers at ordinary batch sizes, and in the last stages of
convolutional networks.

Nor does the length of a step need the gradient: `D · Ω⁻¹ D Γ⁻¹ = (A L) · (E Nᵀ)`, of R rows and
columns, which take `R² (n + m)`. So `D` is not computed, a third of the layer's forward and
backward pass, unless somebody else asks for it, such as a monitor: TensorFlow leaves out what
nobody does.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import tensorflow as tf

from keras_kfc.curvature.api import CurvatureBlock, DirectionsByRows
from keras_kfc.linalg.products import matmul
from keras_kfc.passes.products import GradientProduct

# Thin matrices are multiplied at fewer products a second, and must be made first.
_CHEAPER = 0.7
# Products of the whole gradient below which there is nothing to gain.
_WORTH = 3e6
# Where the batch size is not known: the fewest examples for which rows must be cheaper.
_FEWEST = 16


@runtime_checkable
class BlockOfProducts(Protocol):
    """A block that can precondition the two matrices of a gradient `Aᵀ E`."""

    def costs(self) -> tuple[float, float]:
        """Products that the inverses take by a whole gradient, and by each row of `A` and `E`."""

    def multiply_product(
        self, inputs: tf.Tensor, derivatives: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Two matrices whose product is the damped inverse times `Aᵀ E`.

        Args:
            inputs: `A`, `(G, R, n)`.
            derivatives: `E`, `(G, R, m)`.

        Returns:
            `L`, `(G, n, R)`, and `N`, `(G, R, m)`.
        """

    def multiply(self, weights: tf.Tensor) -> tf.Tensor:
        """The damped inverse times a matrix of the weights, `(G, n, m)`."""


def directions_by_rows(
    blocks: Sequence[CurvatureBlock], products: Mapping[int, GradientProduct]
) -> DirectionsByRows:
    """Preconditioned gradients of the blocks for which rows are cheaper.

    Args:
        blocks: The blocks.
        products: What is known of their gradients, by index of the kernel.
    """
    pairs: list[tuple[Any, GradientProduct]] = [
        (block, products[block.kernel_index])
        for block in blocks
        if isinstance(block, BlockOfProducts) and block.kernel_index in products
    ]
    chosen = [pair for pair in pairs if _is_worth_it(*pair)]
    if not chosen:
        return DirectionsByRows()

    def by_rows() -> list[tuple[tf.Tensor, tf.Tensor]]:
        return [_by_rows(*pair) for pair in chosen]

    if all(product.batch_size is not None for _, product in chosen):
        results = by_rows()
    else:
        # One branch for all: what they take together decides.
        most = int(_most_examples(chosen))
        batch = tf.shape(chosen[0][1].use.pre_activation)[0]
        results = tf.cond(batch <= most, by_rows, lambda: [_whole(*pair) for pair in chosen])
    found = DirectionsByRows()
    for (block, _), (weights, slope) in zip(chosen, results, strict=True):
        found.of.update(block.indices.unstacked(block.layout.linear_map, weights))
        found.slopes[block.indices.every] = slope
    return found


def _by_rows(block: Any, product: GradientProduct) -> tuple[tf.Tensor, tf.Tensor]:
    """The preconditioned gradient, `(G, n, m)`, and its product with the gradient."""
    inputs, derivatives = product.rows(block.ema_weight.dtype)
    left, right = block.multiply_product(inputs, derivatives)
    pairs = matmul(inputs, left) * matmul(derivatives, right, transpose_b=True)
    return matmul(left, right), tf.reduce_sum(pairs)


def _whole(block: Any, product: GradientProduct) -> tuple[tf.Tensor, tf.Tensor]:
    """The same by the gradient."""
    dtype = block.ema_weight.dtype
    if product.positions == 1:
        gradient = matmul(*product.rows(dtype), transpose_a=True)
    else:
        # Patches of a large batch would be larger than all else.
        parts = [tf.cast(part, dtype) for part in product.gradients]
        gradient = block.layout.linear_map.stack_bias(parts[0], *(parts[1:] or [None]))
    direction = block.multiply(gradient)
    return direction, tf.reduce_sum(gradient * direction)


def _is_worth_it(block: BlockOfProducts, product: GradientProduct) -> bool:
    """Whether rows are cheaper, for the size of the batch or for few examples where unknown."""
    if product.positions is None or block.costs()[0] < _WORTH:
        return False
    return _most_examples([(block, product)]) >= (product.batch_size or _FEWEST)


def _most_examples(pairs: Sequence[tuple[Any, GradientProduct]]) -> float:
    """Number of examples up to which the rows of some blocks are cheaper.

    Either way takes `R n m` for a product of `A` and `E` or of what became of them.
    """
    whole = of_example = of_pair = 0.0
    for block, product in pairs:
        positions, (groups, rows, columns) = product.positions or 0, block.layout.block_shape
        whole += _CHEAPER * block.costs()[0]
        of_example += positions * block.costs()[1]
        of_pair += positions**2 * groups * (rows + columns)
    # Where `of_pair x² + of_example x` is `whole`.
    return 2 * whole / (of_example + math.sqrt(of_example**2 + 4 * of_pair * whole))
