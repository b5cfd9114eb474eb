"""Preconditioning the rows of a gradient instead of the gradient.

With a gradient `D = Aᵀ E` of R rows, `Ω⁻¹ D Γ⁻¹ = (A Ω⁻¹)ᵀ (E Γ⁻¹)`, exactly. The left side takes
`n m (n + m)` products, the right side `R (n² + m² + n m)`: less where R is small against n and m,
as in wide layers at ordinary batch sizes, and in the last stages of convolutional networks.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import tensorflow as tf

from keras_kfc.curvature.api import CurvatureBlock
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
        """Products that a whole gradient takes, and those that each row of `A` and `E` takes."""

    def multiply_product(self, inputs: tf.Tensor, derivatives: tf.Tensor) -> tf.Tensor:
        """The damped inverse times `Aᵀ E`, `(G, n, m)`.

        Args:
            inputs: `A`, `(G, R, n)`.
            derivatives: `E`, `(G, R, m)`.
        """


def directions_by_rows(
    blocks: Sequence[CurvatureBlock],
    products: Mapping[int, GradientProduct],
    by_gradient: Callable[[CurvatureBlock], tf.Tensor],
) -> dict[int, tf.Tensor]:
    """Preconditioned gradients of the blocks for which rows are cheaper.

    Args:
        blocks: The blocks.
        products: What is known of their gradients, by index of the kernel.
        by_gradient: Preconditions the whole gradient of a block.

    Returns:
        `(G, n, m)` each, by index of the kernel.
    """
    pairs: list[tuple[Any, GradientProduct]] = [
        (block, products[block.kernel_index])
        for block in blocks
        if isinstance(block, BlockOfProducts) and block.kernel_index in products
    ]
    limits = {block.kernel_index: _most_examples(block, product) for block, product in pairs}
    chosen = [(b, p) for b, p in pairs if limits[b.kernel_index] >= (p.batch_size or _FEWEST)]
    if not chosen:
        return {}

    def by_rows() -> list[tf.Tensor]:
        return [
            block.multiply_product(*product.rows(block.ema_weight.dtype))
            for block, product in chosen
        ]

    if all(product.batch_size is not None for _, product in chosen):
        results = by_rows()
    else:
        # One branch for all: what they take together decides.
        whole = sum(block.costs()[0] for block, _ in chosen)
        of_example = sum(block.costs()[1] * (p.positions or 0) for block, p in chosen)
        most = int(_CHEAPER * whole / of_example)
        batch = tf.shape(chosen[0][1].use.pre_activation)[0]
        results = tf.cond(batch <= most, by_rows, lambda: [by_gradient(b) for b, _ in chosen])
    return {b.kernel_index: result for (b, _), result in zip(chosen, results, strict=True)}


def _most_examples(block: BlockOfProducts, product: GradientProduct) -> float:
    """Number of examples up to which rows are cheaper."""
    whole, of_row = block.costs()
    if product.positions is None or whole < _WORTH:
        return 0.0
    return _CHEAPER * whole / (of_row * product.positions)
