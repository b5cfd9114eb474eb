"""All Kronecker blocks of one optimizer, as one block-diagonal preconditioner."""

import logging
from collections.abc import Callable, Container, Mapping, Sequence

import keras
import tensorflow as tf

from keras_kfc.curvature.kronecker import KroneckerBlock, all_finite, any_of
from keras_kfc.curvature.layout import Partition, factor_dtype, partition_of
from keras_kfc.layers.instrumented import blocks_among, layer_of
from keras_kfc.linalg.inverse import invert_blocks
from keras_kfc.passes.capture import Capture
from keras_kfc.passes.statistics import ExampleSample, OutputFactor, batch_omegas
from keras_kfc.utils.texts import bytes_text

_logger = logging.getLogger("keras_kfc")


class Preconditioner:
    """The approximate Fisher matrix of a network, one block for each layer.

    Args:
        variables: The optimizer's trainable variables. Each that is the kernel
            of an instrumented layer starts a block, with the layer's bias in it
            if that is among the variables.
        add_variable: The optimizer's `add_variable`.
        max_factor_dim: Rows of a factor beyond which it is cut into diagonal blocks,
            or None.
        left_out: Indices of kernels that get no block.

    Attributes:
        blocks: The blocks, in the order of their kernels.
    """

    def __init__(
        self,
        variables: Sequence[keras.Variable],
        add_variable: Callable[..., keras.Variable],
        max_factor_dim: int | None = None,
        left_out: Container[int] = (),
    ):
        self.blocks: list[KroneckerBlock] = []
        self._block_of_kernel: dict[int, KroneckerBlock] = {}
        self._captured: set[int] = set()
        self._kernels: dict[int, keras.Variable] = {}
        for index, layer, bias in blocks_among(variables):
            if index in left_out:
                continue
            variable = variables[index]
            block = KroneckerBlock(
                layer.path,
                partition_of(layer.linear_map, bias is not None, max_factor_dim),
                kernel=index,
                bias=bias,
                dtype=factor_dtype(variable),
                add_variable=add_variable,
            )
            self.blocks.append(block)
            self._block_of_kernel[id(variable)] = block
            self._kernels[index] = variable
        _tell_cuts(self.blocks, max_factor_dim)

    @property
    def covered(self) -> set[int]:
        """Indices of the variables that belong to a block."""
        indices = {block.kernel for block in self.blocks}
        return indices | {block.bias for block in self.blocks if block.bias is not None}

    def blocks_in(self, capture: Capture) -> dict[int, KroneckerBlock]:
        """The blocks of the layers in a capture, by record key."""
        return {
            key: self._block_of_kernel[key]
            for key in capture.records
            if key in self._block_of_kernel
        }

    def has_block(self, kernel: keras.Variable) -> bool:
        """Whether there is a block for a kernel variable."""
        return id(kernel) in self._block_of_kernel

    def forget_captured(self) -> None:
        """Back to no captures: the trace that built the optimizer is followed by another."""
        self._captured = set()

    @property
    def captured(self) -> frozenset[int]:
        """Indices of the kernels whose statistics have been taken, in a graph perhaps."""
        return frozenset(self._captured)

    def missing_factors(self, blocks: Mapping[int, KroneckerBlock]) -> tf.Tensor:
        """Whether any of the given blocks has no factors yet, a boolean scalar."""
        return any_of([tf.equal(block.weight, 0) for block in blocks.values()])

    def accumulate(
        self,
        capture: Capture,
        sample: ExampleSample,
        gammas: Callable[[ExampleSample, Mapping[int, Partition]], Mapping[int, OutputFactor]],
        examples: tf.Tensor,
        decay: tf.Tensor,
    ) -> tf.Tensor:
        """Moves all factors towards those of one batch.

        Args:
            capture: The captured forward pass.
            sample: The examples of it to use.
            gammas: Function from the sample and the layouts of the wanted factors, by record
                key, to the output factors; a record that it leaves out is not updated.
            examples: Number of examples that they count as, a scalar.
            decay: What is left of the weight of former batches, a scalar.

        Returns:
            Number of blocks that refused their factors as not finite.
        """
        blocks = self.blocks_in(capture)
        self._captured |= {block.kernel for block in blocks.values()}
        partitions = {key: block.partition for key, block in blocks.items()}
        factors = gammas(sample, partitions)
        uses = {key: factor.uses for key, factor in factors.items()}
        omegas = batch_omegas(uses, sample, partitions)
        # A NaN can stop at a rectifier, so that layers above it look sound: where an
        # input of one layer is broken, the batch is.
        sound = all_finite([use.dense_inputs() for own in uses.values() for use in own])
        refused = [
            blocks[key].accumulate(omegas[key], factor.gamma, examples, decay, sound)
            for key, factor in factors.items()
        ]
        return tf.reduce_sum(tf.cast(refused, tf.int32))

    def missing_inverses(self) -> tf.Tensor:
        """Whether any block has factors but no inverses yet, a boolean scalar."""
        return any_of([block.has_data() & tf.equal(block.inverted, 0) for block in self.blocks])

    def refresh_inverses(self, damping: tf.Tensor, relative: bool) -> tf.Tensor:
        """Inverts all factors anew.

        Args:
            damping: Damping, a scalar; see `keras_kfc.linalg.block_damping`.
            relative: Whether damping is relative to the curvature.

        Returns:
            Number of blocks that kept their old inverses because the new ones
            were not finite.
        """
        omega_inverses, gamma_inverses = invert_blocks(
            [tf.convert_to_tensor(block.omega) for block in self.blocks],
            [tf.convert_to_tensor(block.gamma) for block in self.blocks],
            [block.partition.block_shape for block in self.blocks],
            damping,
            relative,
        )
        refused = [
            block.store_inverses(omega_inverse, gamma_inverse)
            for block, omega_inverse, gamma_inverse in zip(
                self.blocks, omega_inverses, gamma_inverses, strict=True
            )
        ]
        return tf.reduce_sum(tf.cast(refused, tf.int32))

    def directions(self, gradients: Mapping[int, tf.Tensor]) -> dict[int, tf.Tensor]:
        """Preconditions gradients.

        Args:
            gradients: Gradients by index of their variable.

        Returns:
            `omega⁻¹ D gamma⁻¹` for every covered variable with a gradient, by
            index, in the shape of the variable and the dtype of the block; the gradient
            itself where a layer's statistics have never been recorded.

        Raises:
            ValueError: If a layer was stripped of its block.
        """
        directions: dict[int, tf.Tensor] = {}
        for block in self.blocks:
            present = [i for i in (block.kernel, block.bias) if i is not None and i in gradients]
            if not present:
                continue
            if layer_of(self._kernels[block.kernel]) is None:
                raise ValueError(
                    f"Layer {block.path} was stripped or quantised after the optimizer was built. "
                    "Compile the model again with a new optimizer."
                )
            kernel, bias = self._block_gradients(block, gradients)
            joint = block.precondition(block.linear_map.stack_bias(kernel, bias))
            preconditioned = dict(
                zip((block.kernel, block.bias), block.linear_map.unstack_bias(joint), strict=True)
            )
            for index in present:
                direction = preconditioned[index]
                if block.kernel not in self._captured:
                    # Earlier sessions may have recorded statistics, which count.
                    gradient = tf.cast(gradients[index], direction.dtype)
                    direction = tf.where(block.inverted > 0, direction, gradient)
                directions[index] = direction
        return directions

    def _block_gradients(self, block, gradients):
        """Kernel and bias gradient of a block, zeros for one that is missing."""
        dtype = block.omega.dtype
        kernel, bias = gradients.get(block.kernel), gradients.get(block.bias)
        if kernel is None:
            shape = tf.zeros((block.linear_map.kernel_rows * block.linear_map.outputs,), dtype)
            rows = tf.reshape(shape, (block.linear_map.kernel_rows, block.linear_map.outputs))
            kernel = block.linear_map.unstack_bias(block.linear_map.stack_bias(rows, None))[0]
        if bias is None and block.bias is not None:
            bias = tf.zeros((block.linear_map.outputs,), dtype)
        return tf.cast(kernel, dtype), None if bias is None else tf.cast(bias, dtype)


def _tell_cuts(blocks, max_factor_dim):
    """Logs what factors beyond the limit would have taken, and how they are cut."""
    lines = []
    for block in blocks:
        whole = Partition(block.linear_map, block.partition.use_bias)
        for name, before, after in (
            ("input", whole.omega_shape, block.partition.omega_shape),
            ("output", whole.gamma_shape, block.partition.gamma_shape),
        ):
            if after != before:
                lines.append(
                    f"{block.path}: {name} factor of {before[1]} rows ({_costs_text(before)}), "
                    f"now {after[0]} blocks of {after[1]} rows ({_costs_text(after)})"
                )
    if lines:
        _logger.warning(
            "Factors of more than max_factor_dim=%d rows are cut into diagonal blocks. With "
            "their inverses, and the products of each inversion:\n  %s",
            max_factor_dim,
            "\n  ".join(lines),
        )


def _costs_text(shape):
    count, rows, _ = shape
    return f"{bytes_text(8 * count * rows**2)}, {count * rows**3:.1e} products"
