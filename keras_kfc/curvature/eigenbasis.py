"""The Fisher block of one layer by second moments in the eigenbasis of its Kronecker factors.

`Ω ⊗ Γ` has the eigenvectors `Q_Ω ⊗ Q_Γ` and takes its eigenvalues for products `λ_Ω λ_Γ`. In the
same basis, the best diagonal is that of the Fisher matrix itself, the mean square of each
coordinate of one example's derivative `D_b` (George, Laurent, Bouthillier, Ballas & Vincent
2018, "Fast approximate natural gradient descent in a Kronecker-factored eigenbasis", EKFAC):

    S = E[(Q_Ωᵀ D_b Q_Γ)²],      F̂⁻¹ D = Q_Ω ((Q_Ωᵀ D Q_Γ) / (S + λ)) Q_Γᵀ

Damping is added to the eigenvalues of the product, not split between its factors, and changes
of it cost nothing. S moves with every update of the factors, the basis when inverses are due; S
is then carried over to the new basis as if it were all there is. A side with more rows than the
limit keeps the basis of the weights.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from keras_kfc.curvature.api import BlockLayout, structure
from keras_kfc.curvature.averaging import AveragedBlock, store_inverses
from keras_kfc.curvature.diagonal import DiagonalLayout, damped_inverse_of_diagonal
from keras_kfc.curvature.eigenform import Eigenform, eigenvectors_of
from keras_kfc.curvature.shared import BlockStructure
from keras_kfc.linalg.precision import all_finite
from keras_kfc.linalg.stacks import Invert, invert_stacks
from keras_kfc.maps.api import LinearMap, input_factor, output_factor


@dataclasses.dataclass(frozen=True)
class EigenbasisLayout(DiagonalLayout):
    """What the factors and the second moments of one layer are measured from.

    Args:
        left: Whether there is a basis of the rows, from omega.
        right: Whether there is one of the columns, from gamma.
        vectors: Bases of now, `(G, n, n)` and `(G, m, m)`, or None for that of the weights.
    """

    left: bool = True
    right: bool = True
    vectors: tuple[Any, Any] = (None, None)
    symmetric_factors = frozenset({"omega", "gamma"})

    @property
    def _sides(self) -> dict[str, tuple[int, int, int]]:
        groups, rows, columns = self.weights_shape
        shapes = {"omega": (groups, rows, rows), "gamma": (groups, columns, columns)}
        kept = {"omega": self.left, "gamma": self.right}
        return {name: shape for name, shape in shapes.items() if kept[name]}

    @property
    def factor_shapes(self) -> dict[str, tuple[int, int, int]]:
        """Shapes of the factors, and of S, `(G, n, m)`."""
        return {**self._sides, "squares": self.weights_shape}

    @property
    def inverse_shapes(self) -> dict[str, tuple[int, int, int]]:
        """Shape of `1 / (S + λ)`."""
        return {"squares_inverse": self.weights_shape}

    @property
    def basis_shapes(self) -> dict[str, tuple[int, int, int]]:
        """Shapes of the eigenvectors of the factors."""
        return {f"{name}_vectors": shape for name, shape in self._sides.items()}

    def rows(self, inputs: tf.Tensor) -> tf.Tensor:
        """What each position sees, in the basis of the rows."""
        return _turned(super().rows(inputs), self.vectors[0])

    def columns(self, derivatives: tf.Tensor) -> tf.Tensor:
        """The rows of derivatives, in the basis of the columns."""
        return _turned(super().columns(derivatives), self.vectors[1])

    def from_inputs(
        self,
        inputs: Sequence[tf.Tensor],
        batch_size: tf.Tensor,
        masks: Sequence[tf.Tensor | None],
    ) -> tuple[tf.Tensor, ...]:
        """Omega of one batch."""
        if not self.left:
            return ()
        return (input_factor(self.linear_map, inputs, batch_size, self.use_bias, 1, masks),)

    def from_pass(
        self,
        inputs: Sequence[tf.Tensor],
        derivatives: Sequence[tf.Tensor],
        batch_size: tf.Tensor,
        masks: Sequence[tf.Tensor | None],
    ) -> tuple[tf.Tensor, ...]:
        """Gamma and S of one batch and one backward pass."""
        squares = super().from_pass(inputs, derivatives, batch_size, masks)
        if not self.right:
            return squares
        return (output_factor(self.linear_map, derivatives, 1, masks), *squares)

    def refined(self, factors: Sequence[np.ndarray]) -> BlockLayout:
        """The same in the eigenbasis of some factors, to be measured once more."""
        named = dict(zip(self.factor_shapes, factors, strict=True))
        vectors = [
            tf.constant(eigenvectors_of(named[name])[1], tf.float32) if name in named else None
            for name in ("omega", "gamma")
        ]
        return dataclasses.replace(self, vectors=(vectors[0], vectors[1]))

    def eigenform(self, factors: Sequence[np.ndarray]) -> Eigenform:
        """The diagonal in the basis that the second moments were measured in."""
        left, right = (
            None if vectors is None else np.asarray(vectors, "float64") for vectors in self.vectors
        )
        return Eigenform(self.weights_shape, factors[-1], left, right)


def _turned(rows: tf.Tensor, vectors: tf.Tensor | None) -> tf.Tensor:
    """Rows, `(G, R, k)`, in another basis of their entries."""
    return rows if vectors is None else tf.matmul(rows, tf.cast(vectors, rows.dtype))


class EigenbasisBlock(AveragedBlock):
    """Factors, their eigenvectors, and second moments in that basis, of one layer."""

    layout: EigenbasisLayout

    @property
    def measured(self) -> EigenbasisLayout:
        """The layout, in the basis of now."""
        return dataclasses.replace(self.layout, vectors=self.vectors())

    def vectors(self) -> tuple[tf.Tensor | None, tf.Tensor | None]:
        """Bases of rows and columns, those of the weights before the first inversion."""
        bases: list[tf.Tensor | None] = []
        for name in ("omega_vectors", "gamma_vectors"):
            if name not in self.state:
                bases.append(None)
                continue
            stored = tf.convert_to_tensor(self.state[name])
            start = tf.eye(stored.shape[1], batch_shape=[stored.shape[0]], dtype=stored.dtype)
            bases.append(tf.where(self.has_inverses > 0, stored, start))
        return bases[0], bases[1]

    def multiply(self, weights: tf.Tensor) -> tf.Tensor:
        """The damped inverse times a matrix of the layer's weights, `(G, n, m)`."""
        left, right = self.vectors()
        turned = _product(left, weights, right, transposed=True)
        scaled = turned * tf.convert_to_tensor(self.state["squares_inverse"])
        return _product(left, scaled, right, transposed=False)

    def matrices(self, name: str) -> list[np.ndarray]:
        """Omega or gamma; second moments are no matrix."""
        return [] if name.startswith("squares") else list(self.state[name].numpy())

    def spectra(self, name: str) -> list[np.ndarray]:
        """Eigenvalues of a factor, or the second moments or their inverses, of each group."""
        if name.startswith("squares"):
            return [part.astype("float64").ravel() for part in self.state[name].numpy()]
        return super().spectra(name)


def _product(
    left: tf.Tensor | None, weights: tf.Tensor, right: tf.Tensor | None, transposed: bool
) -> tf.Tensor:
    """`leftᵀ W right`, or `left W rightᵀ`."""
    if left is not None:
        weights = tf.matmul(left, weights, transpose_a=transposed)
    if right is not None:
        weights = tf.matmul(weights, right, transpose_b=not transposed)
    return weights


class EigenbasisRefresh:
    """New bases, and inverses of second moments.

    Args:
        blocks: The blocks.
    """

    def __init__(self, blocks: Sequence[EigenbasisBlock]):
        self._blocks = blocks

    @property
    def trace(self) -> tf.Tensor:
        """Sum of all second moments, a scalar: the trace does not depend on the basis."""
        squares = [tf.convert_to_tensor(block.state["squares"]) for block in self._blocks]
        dtype = max((part.dtype for part in squares), key=lambda dtype: dtype.size)
        return tf.reduce_sum(tf.stack([tf.cast(tf.reduce_sum(part), dtype) for part in squares]))

    @property
    def size(self) -> float:
        """Number of weights."""
        return float(sum(np.prod(block.layout.weights_shape) for block in self._blocks))

    def run(
        self, damping: tf.Tensor, network_mean: tf.Tensor | None, invert: Invert = invert_stacks
    ) -> tf.Tensor:
        """Computes eigenvectors anew, and carries second moments over."""
        del invert
        return tf.stack([self._renewed(block, damping, network_mean) for block in self._blocks])

    @staticmethod
    def _renewed(
        block: EigenbasisBlock, damping: tf.Tensor, network_mean: tf.Tensor | None
    ) -> tf.Tensor:
        squares = tf.convert_to_tensor(block.state["squares"])
        before, eigenvalues, vectors = block.vectors(), {}, {}
        for name in ("omega", "gamma"):
            if name in block.state:
                factor = tf.convert_to_tensor(block.state[name])
                eigenvalues[name], vectors[name] = tf.linalg.eigh(factor)
        rows, columns = (
            None
            if name not in vectors
            else tf.square(tf.matmul(vectors[name], old, transpose_a=True))
            for name, old in zip(("omega", "gamma"), before, strict=True)
        )
        carried = _product(rows, squares, columns, transposed=False)
        if len(vectors) == 2:
            # Nothing is known in this basis yet but what the factors say.
            first = eigenvalues["omega"][:, :, None] * eigenvalues["gamma"][:, None, :]
            carried = tf.where(block.has_inverses > 0, carried, tf.maximum(first, 0.0))
        inverse = damped_inverse_of_diagonal(carried, damping, network_mean)
        refused = store_inverses([block], [[inverse]])[0]
        usable = ~refused & (block.ema_weight > 0) & all_finite([carried, *vectors.values()])
        for name, value in (
            ("squares", carried),
            *((f"{name}_vectors", value) for name, value in vectors.items()),
        ):
            variable = block.state[name]
            variable.assign(tf.where(usable, value, variable))
        return refused


@structure("eigenbasis")
class Eigenbasis(BlockStructure[EigenbasisLayout]):
    """Second moments in the eigenbasis of Kronecker factors."""

    block_type, refresh_type = EigenbasisBlock, EigenbasisRefresh

    def layout(
        self,
        linear_map: LinearMap,
        use_bias: bool,
        max_dim: int | None,
        weight_sharing: str = "expand",
    ) -> EigenbasisLayout:
        """A basis for each side within the limit."""
        del weight_sharing
        rows = linear_map.kernel_rows + use_bias
        columns = linear_map.outputs // linear_map.groups
        limit = max(rows, columns) if max_dim is None else max_dim
        return EigenbasisLayout(linear_map, use_bias, rows <= limit, columns <= limit)
