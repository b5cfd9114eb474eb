"""What a curvature is to the optimizer, and what a structure of its blocks has to define.

The curvature is an approximation of the Fisher matrix of a network, with a block for each covered
layer. A *structure* says what a block keeps (its *factors*: averages over batches, and what is
computed of them now and then), and how it is damped and inverted. A structure is a file in this
folder with a class that `@structure("name")` registers.

Shapes: a layer's weights with bias are one matrix `(G, n, m)` as in `keras_kfc.maps.api`.
"""

import dataclasses
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any, Protocol, TypeVar, runtime_checkable

import keras
import numpy as np
import tensorflow as tf

from keras_kfc.curvature.eigenform import Eigenform
from keras_kfc.linalg.stacks import Invert, invert_stacks
from keras_kfc.maps.api import LinearMap
from keras_kfc.maps.weights import VariableIndices
from keras_kfc.passes.products import GradientProduct
from keras_kfc.passes.statistics import BatchStatistics, Moments
from keras_kfc.placement.averages import WeightedVariables


class BlockLayout(Moments, Protocol):
    """One layer's block before it has variables: what it will keep, and what it measures."""

    @property
    def linear_map(self) -> LinearMap:
        """The layer's weights as a linear map."""

    @property
    def use_bias(self) -> bool:
        """Whether the block has a row for the bias."""

    @property
    def factor_shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shapes of the averages over batches, by name, in the order of a batch's moments."""

    @property
    def symmetric_factors(self) -> Container[str]:
        """Names of the averages that are stacks of symmetric matrices, as their inverses are."""

    @property
    def inverse_shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shapes of what is computed when inverses are due.

        Each is called after the factor that it is the inverse of: `"gamma_inverse"`.
        """

    def compromises(self, max_dim: int | None) -> list[str]:
        """What a limit on the size of factors did to this block, a line for each factor."""

    def eigenform(self, factors: Sequence[np.ndarray]) -> Eigenform:
        """The block that some factors make, without damping.

        Args:
            factors: Of the shapes `factor_shapes`, in their order, float64.
        """


class CurvatureBlock(Protocol):
    """The Fisher block of one layer, with its variables.

    `keras_kfc.curvature.averaging.AveragedBlock` has all of this but `multiply`.
    """

    path: str
    layout: BlockLayout
    # Where its variables are among the trainable ones.
    indices: VariableIndices
    ema_weight: keras.Variable
    has_inverses: keras.Variable

    @property
    def kernel_index(self) -> int:
        """Index of the kernel by which everybody knows the block."""

    @property
    def state(self) -> Mapping[str, keras.Variable]:
        """All variables of the block, by what they are for."""

    @property
    def measured(self) -> BlockLayout:
        """What to measure of a batch now: the layout, or one with what the block has learnt."""

    def move(self, moments: Sequence[tf.Tensor], rate: tf.Tensor, weight: tf.Tensor) -> None:
        """Moves the averages towards the moments of a batch.

        Args:
            moments: A tensor for each factor.
            rate: Part of the way, a scalar; 0 where the batch does not count.
            weight: What `ema_weight` becomes.
        """

    @property
    def averages(self) -> WeightedVariables:
        """The averages over batches, and what those of a replica count."""

    def multiply(self, weights: tf.Tensor) -> tf.Tensor:
        """The damped inverse times a matrix of the layer's weights, `(G, n, m)`."""

    def matrices(self, name: str) -> list[np.ndarray]:
        """The diagonal blocks of a factor or an inverse; none where it is no matrix."""

    def spectra(self, name: str) -> list[np.ndarray]:
        """Eigenvalues of a factor or an inverse.

        Args:
            name: A name of `factor_shapes` or of `inverse_shapes`.

        Returns:
            One array for each diagonal block of the factor, not sorted.
        """


@runtime_checkable
class BlockOfRows(Protocol):
    """A block that can precondition some rows of a table without the others."""

    def multiply_rows(self, rows: tf.Tensor, numbers: tf.Tensor) -> tf.Tensor:
        """The damped inverse times some rows, `(N, m)`; `numbers` says which, `(N,)`."""


class Refresh(Protocol):
    """New inverses for all blocks of one structure, about to be computed."""

    @property
    def trace(self) -> tf.Tensor:
        """Trace of all these blocks, a scalar."""

    @property
    def size(self) -> float:
        """Number of their rows, which is that of the parameters."""

    def run(
        self, damping: tf.Tensor, network_mean: tf.Tensor | None, invert: Invert = invert_stacks
    ) -> tf.Tensor:
        """Computes and stores the inverses.

        Args:
            damping: Scalar, at least 0: `λ`, absolute if `network_mean` is None, else
                in units of the mean eigenvalue of each block.
            network_mean: Mean eigenvalue of the whole curvature, a scalar, for blocks without
                one of their own; or None.
            invert: What inverts stacks of matrices.

        Returns:
            Whether the new inverses of each block were refused as not finite, `(blocks,)`.
        """


class Structure(Protocol):
    """A kind of curvature block."""

    # Whether it is to be had for any linear map, so that a user may choose it.
    for_any_map: bool

    def layout(
        self,
        linear_map: LinearMap,
        use_bias: bool,
        max_dim: int | None,
        weight_sharing: str = "expand",
    ) -> BlockLayout:
        """The layout of a layer's block.

        Args:
            linear_map: The layer's weights as a linear map.
            use_bias: Whether the bias is in the block.
            max_dim: Rows that no matrix of the block may have more than, or None.
            weight_sharing: The setting for weights that an example uses at many positions, for
                structures that need one.
        """

    def block(
        self,
        path: str,
        layout: BlockLayout,
        indices: VariableIndices,
        dtype: str,
        add_variable: Callable[..., keras.Variable],
    ) -> CurvatureBlock:
        """Makes a block with its variables."""

    def refresh(self, blocks: Sequence[Any]) -> Refresh:
        """Prepares new inverses for all blocks of this structure, at least one."""


@dataclasses.dataclass(frozen=True)
class DirectionsByRows:
    """Preconditioned gradients of some blocks.

    Args:
        of: Those of kernels and biases, by index of the variable.
        slopes: Their products with the gradients, by the indices of a block's variables.
    """

    of: dict[int, tf.Tensor] = dataclasses.field(default_factory=dict)
    slopes: dict[tuple[int, ...], tf.Tensor] = dataclasses.field(default_factory=dict)


class Curvature(Protocol):
    """What the optimizer holds: an approximate Fisher matrix of the whole network."""

    @property
    def blocks(self) -> Sequence[CurvatureBlock]:
        """The blocks, in the order of their kernels."""

    @property
    def covered(self) -> set[int]:
        """Indices of the variables that belong to a block."""

    def update(
        self, statistics: BatchStatistics, examples: tf.Tensor, decay: tf.Tensor
    ) -> tf.Tensor:
        """Moves all factors towards those of a batch; returns how many blocks refused."""

    def refresh(
        self,
        damping: tf.Tensor,
        relative: bool,
        blocks: Sequence[CurvatureBlock] | None = None,
        invert: Invert = invert_stacks,
    ) -> tf.Tensor:
        """Inverts factors anew, of some blocks or all; returns how many kept their inverses."""

    @property
    def tables(self) -> frozenset[int]:
        """Indices of covered variables whose rows can be preconditioned one by one."""

    def natural_gradient(self, gradients: Mapping[int, tf.Tensor]) -> dict[int, tf.Tensor]:
        """`F⁻¹ g`, for every covered variable with a gradient, by index."""

    def directions_by_rows(self, products: Mapping[int, GradientProduct]) -> DirectionsByRows:
        """The same with `g · F⁻¹ g` for gradients that are known as `Aᵀ E`, where that is cheaper.

        `products` go by index of the kernel.
        """

    def direction_of_rows(self, index: int, rows: tf.Tensor, numbers: tf.Tensor) -> tf.Tensor:
        """`F⁻¹ g` for some rows of a table, `(N, m)`; `numbers` says which, `(N,)`."""


STRUCTURES: dict[str, Structure] = {}
Kind = TypeVar("Kind", bound=Callable[[], Any])


def structure(name: str) -> Callable[[Kind], Kind]:
    """Registers a class as a structure.

    Args:
        name: What `KFC(structure=...)` calls it.
    """

    def register(kind: Kind) -> Kind:
        STRUCTURES[name] = kind()
        return kind

    return register
