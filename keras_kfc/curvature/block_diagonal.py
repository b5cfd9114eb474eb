"""The approximate Fisher matrix of a network: block-diagonal, one block for each covered layer."""

import logging
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_kfc.curvature.api import (
    STRUCTURES,
    BlockLayout,
    BlockOfRows,
    CurvatureBlock,
    DirectionsByRows,
)
from keras_kfc.curvature.averaging import move_averages
from keras_kfc.curvature.choice import planned_blocks
from keras_kfc.curvature.products import directions_by_rows
from keras_kfc.layers.instrumented import layer_of_kernel
from keras_kfc.linalg.damping import concat
from keras_kfc.linalg.precision import factor_dtype, stacked
from keras_kfc.linalg.stacks import Invert, invert_stacks
from keras_kfc.passes.capture import Capture
from keras_kfc.passes.products import GradientProduct
from keras_kfc.passes.statistics import BatchStatistics
from keras_kfc.placement.api import Placement
from keras_kfc.placement.averages import average

_logger = logging.getLogger("keras_kfc")


class BlockDiagonal:
    """The blocks of one optimizer.

    Args:
        variables: The optimizer's trainable variables. Each that is the kernel
            of an instrumented layer starts a block, with the layer's bias in it
            if that is among the variables.
        add_variable: The optimizer's `add_variable`.
        structure: Name of the blocks' structure, for layers that have no choice of their own.
        max_factor_dim: Rows beyond which a factor is cut into diagonal blocks, or None.
        left_out: Indices of kernels that get no block.
        weight_sharing: As in `keras_kfc.curvature.choice.planned_blocks`.

    Attributes:
        blocks: The blocks, in the order of their kernels.
    """

    def __init__(
        self,
        variables: Sequence[keras.Variable],
        add_variable: Callable[..., keras.Variable],
        structure: str = "kronecker",
        max_factor_dim: int | None = None,
        left_out: Container[int] = (),
        weight_sharing: str | None = None,
    ):
        self.blocks: list[CurvatureBlock] = []
        self._block_of_kernel: dict[int, CurvatureBlock] = {}
        self._captured: set[int] = set()
        self._weights = list(variables)
        self._members: dict[str, list[CurvatureBlock]] = {}
        for plan in planned_blocks(variables, structure, max_factor_dim, weight_sharing):
            index = plan.kernel_index
            if index in left_out:
                continue
            variable = variables[index]
            block = STRUCTURES[plan.structure].block(
                plan.path, plan.layout, plan.indices, factor_dtype(variable), add_variable
            )
            self.blocks.append(block)
            self._members.setdefault(plan.structure, []).append(block)
            self._block_of_kernel[id(variable)] = block
        _tell_compromises(self.blocks, max_factor_dim)

    @property
    def covered(self) -> set[int]:
        """Indices of the variables that belong to a block."""
        return {index for block in self.blocks for index in block.indices.every}

    def structure_of(self, block: CurvatureBlock) -> str:
        """Name of a block's structure."""
        return next(name for name, members in self._members.items() if block in members)

    def blocks_in(self, capture: Capture) -> dict[int, CurvatureBlock]:
        """The blocks of the layers in a capture, by record key."""
        return {
            key: self._block_of_kernel[key]
            for key in capture.records
            if key in self._block_of_kernel
        }

    def has_block(self, kernel: keras.Variable) -> bool:
        """Whether there is a block for a kernel variable."""
        return id(kernel) in self._block_of_kernel

    def layouts_in(self, capture: Capture) -> dict[int, BlockLayout]:
        """What to measure of the layers in a capture, by record key."""
        return {key: block.measured for key, block in self.blocks_in(capture).items()}

    def note_captured(self, capture: Capture) -> None:
        """Notes that the layers in a capture are being measured, in a graph perhaps."""
        self._captured |= {block.kernel_index for block in self.blocks_in(capture).values()}

    def forget_captured(self) -> None:
        """Back to no captures: the trace that built the optimizer is followed by another."""
        self._captured = set()

    @property
    def captured(self) -> frozenset[int]:
        """Indices of the kernels whose statistics have been taken, in a graph perhaps."""
        return frozenset(self._captured)

    def missing_factors(self, capture: Capture) -> tf.Tensor:
        """Whether any block of a captured layer has no factors yet, a boolean scalar."""
        blocks = self.blocks_in(capture).values()
        return tf.reduce_any(tf.equal(stacked([block.ema_weight for block in blocks]), 0))

    def update(
        self, statistics: BatchStatistics, examples: tf.Tensor, decay: tf.Tensor
    ) -> tf.Tensor:
        """Moves all factors towards those of one batch.

        Args:
            statistics: What the batch tells.
            examples: Number of examples that they count as, a scalar.
            decay: What is left of the weight of former batches, a scalar.

        Returns:
            Number of blocks that refused their moments as not finite.
        """
        blocks = [self._block_of_kernel[key] for key in statistics.moments]
        moments = list(statistics.moments.values())
        refused = move_averages(blocks, moments, examples, decay, statistics.batch_is_finite)
        return tf.reduce_sum(tf.cast(refused, tf.int32))

    def average_over_replicas(self, placement: Placement) -> None:
        """Gives all replicas the same factors; in cross-replica context."""
        average(placement, [block.averages for block in self.blocks])

    def may_move(self) -> tf.Tensor:
        """Whether some layer may get its first factors though none are due, a boolean scalar."""
        inverted = [b.has_inverses for b in self.blocks if b.kernel_index in self._captured]
        # Replicas may differ in who has factors, and not in who has inverses.
        return tf.reduce_any(tf.equal(stacked([*inverted, 1.0]), 0))

    def missing_inverses(self, blocks: Sequence[CurvatureBlock]) -> tf.Tensor:
        """Whether any of some blocks has factors but no inverses yet, a boolean scalar."""
        weights = stacked([block.ema_weight for block in blocks])
        without = tf.equal(stacked([block.has_inverses for block in blocks]), 0)
        return tf.reduce_any((weights > 0) & without)

    def refresh(
        self,
        damping: tf.Tensor,
        relative: bool,
        blocks: Sequence[CurvatureBlock] | None = None,
        invert: Invert = invert_stacks,
    ) -> tf.Tensor:
        """Inverts factors anew.

        Args:
            damping: Damping, a scalar.
            relative: Whether it is in units of each block's mean eigenvalue; a block without one
                gets that of the blocks together.
            blocks: The blocks, or None for all.
            invert: What inverts stacks of matrices.

        Returns:
            Number of blocks that kept their old inverses because the new ones
            were not finite.
        """
        members = {
            name: [block for block in own if blocks is None or block in blocks]
            for name, own in self._members.items()
        }
        refreshes = [STRUCTURES[name].refresh(own) for name, own in members.items() if own]
        network_mean = None
        if relative:
            dtype = max((r.trace.dtype for r in refreshes), key=lambda dtype: dtype.size)
            traces = [tf.cast(refresh.trace, dtype) for refresh in refreshes]
            size = sum(refresh.size for refresh in refreshes)
            network_mean = tf.reduce_sum(tf.stack(traces)) / size
        refused = concat([one.run(damping, network_mean, invert) for one in refreshes])
        return tf.reduce_sum(tf.cast(refused, tf.int32))

    def mean_eigenvalue(self, block: CurvatureBlock) -> tf.Tensor:
        """Mean eigenvalue of a block without damping, a scalar."""
        refresh = STRUCTURES[self.structure_of(block)].refresh([block])
        return refresh.trace / refresh.size

    def directions_by_rows(self, products: Mapping[int, GradientProduct]) -> DirectionsByRows:
        """Preconditions those of the gradients that are products, where that is cheaper.

        Args:
            products: Gradients that are products of two thin matrices, by index of their kernel.
        """
        measured = [block for block in self.blocks if block.kernel_index in self._captured]
        return directions_by_rows(measured, products)

    def natural_gradient(self, gradients: Mapping[int, tf.Tensor]) -> dict[int, tf.Tensor]:
        """Preconditions gradients.

        Args:
            gradients: Gradients by index of their variable.

        Returns:
            `F⁻¹ g` for every covered variable with a gradient, by
            index, in the shape of the variable and the dtype of the block; the gradient
            itself where a layer's statistics have never been recorded.

        Raises:
            ValueError: If a layer was stripped of its block.
        """
        directions: dict[int, tf.Tensor] = {}
        for block in self.blocks:
            present = [index for index in block.indices.every if index in gradients]
            if not present:
                continue
            if layer_of_kernel(self._weights[block.kernel_index]) is None:
                raise ValueError(
                    f"Layer {block.path} was stripped or quantised after the optimizer was built. "
                    "Compile the model again with a new optimizer."
                )
            linear_map = block.layout.linear_map
            parts = self._block_gradients(block, gradients)
            weights = block.multiply(block.indices.stacked(linear_map, parts))
            preconditioned = block.indices.unstacked(linear_map, weights)
            for index in present:
                direction = preconditioned[index]
                directions[index] = self._if_measured(block, direction, gradients[index])
        return directions

    @property
    def tables(self) -> frozenset[int]:
        """Indices of the kernels whose rows can be preconditioned one by one."""
        return frozenset(b.kernel_index for b in self.blocks if isinstance(b, BlockOfRows))

    def direction_of_rows(self, index: int, rows: tf.Tensor, numbers: tf.Tensor) -> tf.Tensor:
        """`F⁻¹ g` for some rows of a table.

        Args:
            index: Index of the table.
            rows: The gradient's rows, `(N, m)`.
            numbers: Which ones they are, `(N,)`.
        """
        block: Any = self._block_of_kernel[id(self._weights[index])]
        rows = tf.cast(rows, block.ema_weight.dtype)
        return self._if_measured(block, block.multiply_rows(rows, numbers), rows)

    def _if_measured(
        self, block: CurvatureBlock, direction: tf.Tensor, gradient: tf.Tensor
    ) -> tf.Tensor:
        """A direction, or the gradient if the block's statistics have never been recorded."""
        if block.kernel_index in self._captured:
            return direction
        # Earlier sessions may have recorded statistics, which count.
        return tf.where(block.has_inverses > 0, direction, tf.cast(gradient, direction.dtype))

    def _block_gradients(
        self, block: CurvatureBlock, gradients: Mapping[int, tf.Tensor]
    ) -> dict[int, tf.Tensor]:
        """Gradients of all variables of a block, by index, zeros for one that is missing."""
        dtype, of = block.ema_weight.dtype, self._weights
        return {
            index: tf.cast(gradients[index], dtype)
            if index in gradients
            else tf.zeros(of[index].shape, dtype)
            for index in block.indices.every
        }


def _tell_compromises(blocks: Sequence[CurvatureBlock], max_factor_dim: int | None) -> None:
    """Logs what factors beyond the limit would have taken, and how they are cut."""
    lines = [
        f"{block.path}: {text}"
        for block in blocks
        for text in block.layout.compromises(max_factor_dim)
    ]
    if lines:
        _logger.info(
            "Factors of more than max_factor_dim=%d rows are cut into diagonal blocks. With "
            "their inverses, and the products of each inversion:\n  %s",
            max_factor_dim,
            "\n  ".join(lines),
        )
