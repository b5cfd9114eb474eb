"""Kronecker blocks whose input factor is diagonal: tables of rows that are looked up.

The input of an embedding is a unit vector, so that `Ω`, the sum over the positions of an example
of their outer products, counts tokens, and is diagonal with nothing approximated. `Γ` is as
elsewhere (`keras_kfc.curvature.kronecker`), and so is the damping. A row's direction depends on its
own gradient alone: rows that a batch did not use stay as they are.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from keras_kfc.curvature.api import structure
from keras_kfc.curvature.averaging import AveragedBlock, store_inverses
from keras_kfc.curvature.eigenform import Eigenform, eigenvectors_of
from keras_kfc.curvature.shared import TableStructure
from keras_kfc.linalg.damping import block_damping
from keras_kfc.linalg.precision import resolution
from keras_kfc.linalg.stacks import Invert, invert_stacks
from keras_kfc.maps.api import output_factor
from keras_kfc.maps.embedding import EmbeddingMap


@dataclasses.dataclass(frozen=True)
class DiagonalInputLayout:
    """What the factors of a table of rows are measured from.

    Args:
        linear_map: The table as a linear map.
    """

    linear_map: EmbeddingMap
    use_bias = False
    needs_inputs = False
    symmetric_factors = frozenset({"gamma"})

    @property
    def factor_shapes(self) -> dict[str, tuple[int, ...]]:
        """The diagonal of omega, `(V,)`, and gamma, `(1, m, m)`."""
        columns = self.linear_map.outputs
        return {"counts": (self.linear_map.inputs,), "gamma": (1, columns, columns)}

    @property
    def inverse_shapes(self) -> dict[str, tuple[int, ...]]:
        """Their damped inverses, likewise."""
        return {f"{name}_inverse": shape for name, shape in self.factor_shapes.items()}

    def from_inputs(
        self,
        inputs: Sequence[tf.Tensor],
        batch_size: tf.Tensor,
        masks: Sequence[tf.Tensor | None],
    ) -> tuple[tf.Tensor, ...]:
        """How often each token is in an example, `(V,)`."""
        pairs = zip(inputs, masks, strict=True)
        counts = tf.add_n([self.linear_map.input_counts(tokens, mask) for tokens, mask in pairs])
        return (counts / tf.cast(batch_size, counts.dtype),)

    def from_pass(
        self,
        inputs: Sequence[tf.Tensor],
        derivatives: Sequence[tf.Tensor],
        batch_size: tf.Tensor,
        masks: Sequence[tf.Tensor | None],
    ) -> tuple[tf.Tensor, ...]:
        """Gamma of one batch and one backward pass, `(1, m, m)`."""
        del inputs, batch_size
        return (output_factor(self.linear_map, derivatives, masks=masks),)

    def compromises(self, max_dim: int | None) -> list[str]:
        """None: one factor is diagonal, and the other as wide as a row."""
        del max_dim
        return []

    def eigenform(self, factors: Sequence[np.ndarray]) -> Eigenform:
        """`diag(counts) ⊗ Γ`."""
        return table_eigenform(*factors)


class DiagonalInputBlock(AveragedBlock):
    """Factors and damped inverses of one table of rows."""

    layout: DiagonalInputLayout

    @property
    def counts(self) -> tf.Tensor:
        """Moving average of the diagonal of omega, `(V,)`."""
        return tf.convert_to_tensor(self.state["counts"])

    @property
    def gamma(self) -> tf.Tensor:
        """Moving average of gamma, `(1, m, m)`."""
        return tf.convert_to_tensor(self.state["gamma"])

    def multiply(self, weights: tf.Tensor) -> tf.Tensor:
        """The damped inverse times a whole table, `(1, V, m)`."""
        scales = tf.convert_to_tensor(self.state["counts_inverse"])
        return scales[None, :, None] * (weights @ tf.convert_to_tensor(self.state["gamma_inverse"]))

    def multiply_rows(self, rows: tf.Tensor, numbers: tf.Tensor) -> tf.Tensor:
        """The same for some rows of the table.

        Args:
            rows: `(N, m)`.
            numbers: Which ones they are, `(N,)`.
        """
        scales = tf.gather(tf.convert_to_tensor(self.state["counts_inverse"]), numbers)
        return scales[:, None] * (rows @ tf.convert_to_tensor(self.state["gamma_inverse"])[0])

    def matrices(self, name: str) -> list[np.ndarray]:
        """Gamma or its inverse; the other factor is no matrix."""
        values = self.state[name].numpy()
        return list(values) if values.ndim == 3 else []

    def spectra(self, name: str) -> list[np.ndarray]:
        """Eigenvalues of a factor or an inverse: the entries of one that is diagonal."""
        values = self.state[name].numpy()
        return [values.astype("float64")] if values.ndim == 1 else super().spectra(name)


class DiagonalInputRefresh:
    """New inverses of the factors of tables.

    Args:
        blocks: The blocks.
    """

    def __init__(self, blocks: Sequence[DiagonalInputBlock]):
        self._blocks = blocks

    @property
    def trace(self) -> tf.Tensor:
        """`Σ tr Ω tr Γ`, a scalar."""
        dtype = max((block.counts.dtype for block in self._blocks), key=lambda dtype: dtype.size)
        traces = [
            tf.cast(tf.reduce_sum(block.counts) * tf.linalg.trace(block.gamma)[0], dtype)
            for block in self._blocks
        ]
        return tf.reduce_sum(tf.stack(traces))

    @property
    def size(self) -> float:
        """Number of weights of all tables."""
        maps = [block.layout.linear_map for block in self._blocks]
        return float(sum(linear_map.inputs * linear_map.outputs for linear_map in maps))

    def run(
        self, damping: tf.Tensor, network_mean: tf.Tensor | None, invert: Invert = invert_stacks
    ) -> tf.Tensor:
        """Inverts the factors of all tables."""
        inverses = [
            inverses_of(block.counts, block.gamma, damping, network_mean, invert)
            for block in self._blocks
        ]
        return store_inverses(self._blocks, inverses)


def inverses_of(
    counts: tf.Tensor,
    gamma: tf.Tensor,
    damping: tf.Tensor,
    network_mean: tf.Tensor | None,
    invert: Invert,
) -> list[tf.Tensor]:
    """Damped inverses of a diagonal factor, `(V,)`, and a whole one, `(1, m, m)`."""
    mean = tf.reduce_mean(counts)
    gamma_mean = tf.linalg.trace(gamma)[0] / gamma.shape[1]
    shift, gamma_shift = block_damping(mean, gamma_mean, damping, network_mean)
    # As in `damped_inverse`: a token that never came is not divided by rounding errors.
    smallest = counts.dtype.as_numpy_dtype(10 * resolution(counts.dtype))
    scales = 1 / (counts + tf.maximum(shift, smallest * mean))
    return [scales, *invert([gamma], [gamma_shift[None]])]


def table_eigenform(scales: np.ndarray, gamma: np.ndarray) -> Eigenform:
    """`diag(scales) ⊗ Γ` for a table of rows, of `(V,)` and `(1, m, m)`."""
    columns, right = eigenvectors_of(gamma)
    values = scales[None, :, None] * columns[:, None, :]
    return Eigenform(values.shape, values, right=right)


@structure("diagonal_input")
class DiagonalInput(TableStructure[DiagonalInputLayout]):
    """A diagonal input factor and a whole output factor, for tables of rows alone."""

    layout_type = DiagonalInputLayout
    block_type, refresh_type = DiagonalInputBlock, DiagonalInputRefresh
