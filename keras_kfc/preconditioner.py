"""All Kronecker blocks of one optimizer, as one block-diagonal preconditioner."""

import logging
from collections.abc import Callable, Mapping, Sequence

import keras
import tensorflow as tf

from keras_kfc.blocks import KroneckerBlock, all_finite, any_of
from keras_kfc.capture import Capture
from keras_kfc.layers import blocks_among, layer_of
from keras_kfc.linalg import invert_blocks
from keras_kfc.memory import bytes_text
from keras_kfc.partition import Partition, factor_dtype, partition_of
from keras_kfc.statistics import ExampleSample, batch_omegas

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

    Attributes:
        blocks: The blocks, in the order of their kernels.
    """

    def __init__(
        self,
        variables: Sequence[keras.Variable],
        add_variable: Callable[..., keras.Variable],
        max_factor_dim: int | None = None,
    ):
        self.blocks: list[KroneckerBlock] = []
        self._block_of_kernel: dict[int, KroneckerBlock] = {}
        self._captured: set[int] = set()
        self._kernels: dict[int, keras.Variable] = {}
        for index, layer, bias in blocks_among(variables):
            variable = variables[index]
            block = KroneckerBlock(
                layer.path,
                partition_of(layer.kronecker_geometry, bias is not None, max_factor_dim),
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
        found = {
            key: self._block_of_kernel[key]
            for key in capture.records
            if key in self._block_of_kernel
        }
        self._captured |= {block.kernel for block in found.values()}
        return found

    def missing_factors(self, blocks: Mapping[int, KroneckerBlock]) -> tf.Tensor:
        """Whether any of the given blocks has no factors yet, a boolean scalar."""
        return any_of([tf.equal(block.weight, 0) for block in blocks.values()])

    def accumulate(
        self,
        capture: Capture,
        sample: ExampleSample,
        gammas: Callable[[ExampleSample, Mapping[int, Partition]], Mapping[int, tf.Tensor]],
        decay: tf.Tensor,
    ) -> tf.Tensor:
        """Moves all factors towards those of one batch.

        Args:
            capture: The captured forward pass.
            sample: The examples of it to use.
            gammas: Function from the sample and the layouts of the wanted factors, by record
                key, to the output factors; a record that it leaves out is not updated.
            decay: What is left of the weight of former batches, a scalar.

        Returns:
            Number of blocks that refused their factors as not finite.
        """
        blocks = self.blocks_in(capture)
        partitions = {key: block.partition for key, block in blocks.items()}
        new_gammas = gammas(sample, partitions)
        omegas = batch_omegas(capture, sample, {key: partitions[key] for key in new_gammas})
        # A NaN can stop at a rectifier, so that layers above it look sound: where an
        # input of one layer is broken, the batch is.
        sound = all_finite(
            [a for record in capture.records.values() for a in record.dense_inputs()]
        )
        refused = [
            blocks[key].accumulate(omegas[key], new_gammas[key], sample.size, decay, sound)
            for key in new_gammas
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

    def directions(
        self, gradients: Mapping[int, tf.Tensor], first: bool = False
    ) -> dict[int, tf.Tensor]:
        """Preconditions gradients.

        Args:
            gradients: Gradients by index of their variable.
            first: Whether the optimizer was built just now, so that parts of a
                model could not know it in the forward pass.

        Returns:
            `omega⁻¹ D gamma⁻¹` for every covered variable with a gradient, by
            index, in the shape of the variable and the dtype of the block.

        Raises:
            ValueError: If a layer has a gradient but its statistics were never seen.
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
            if block.kernel not in self._captured and not first:
                raise ValueError(
                    f"KFC received a gradient for layer {block.path}, but never saw its inputs "
                    "and derivatives. Train the model with `fit` or `train_on_batch`; let a "
                    "train step of its own call the model itself and `compute_loss`; or run the "
                    "forward pass inside `keras_kfc.Capture()` and call "
                    "`optimizer.update_factors` before `optimizer.apply_gradients`. A layer that "
                    "is not called in training can be frozen (`trainable=False`) or left to the "
                    "fallback rule (`keras_kfc.instrument(model, exclude=[...])`)."
                )
            if block.kernel not in self._captured:
                # Without statistics, a step along the gradient, of the usual size.
                directions.update((i, tf.cast(gradients[i], block.omega.dtype)) for i in present)
                continue
            kernel, bias = self._block_gradients(block, gradients)
            joint = block.precondition(block.geometry.to_joint(kernel, bias))
            kernel, bias = block.geometry.from_joint(joint)
            if block.kernel in present:
                directions[block.kernel] = kernel
            if block.bias is not None and block.bias in present:
                directions[block.bias] = bias
        return directions

    def _block_gradients(self, block, gradients):
        """Kernel and bias gradient of a block, zeros for one that is missing."""
        dtype = block.omega.dtype
        kernel, bias = gradients.get(block.kernel), gradients.get(block.bias)
        if kernel is None:
            shape = tf.zeros((block.geometry.kernel_rows * block.geometry.outputs,), dtype)
            rows = tf.reshape(shape, (block.geometry.kernel_rows, block.geometry.outputs))
            kernel = block.geometry.from_joint(block.geometry.to_joint(rows, None))[0]
        if bias is None and block.bias is not None:
            bias = tf.zeros((block.geometry.outputs,), dtype)
        return tf.cast(kernel, dtype), None if bias is None else tf.cast(bias, dtype)


def _tell_cuts(blocks, max_factor_dim):
    """Logs what factors beyond the limit would have taken, and how they are cut."""
    lines = []
    for block in blocks:
        whole = Partition(block.geometry, block.partition.use_bias)
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
