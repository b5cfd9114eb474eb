"""The blocks of an approximate Fisher matrix on given data, by their eigenvalues."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from keras_kfc.analysis.batches import Batches
from keras_kfc.analysis.moments import mean_moments
from keras_kfc.curvature.api import STRUCTURES
from keras_kfc.curvature.eigenform import Eigenform
from keras_kfc.maps.api import LinearMap
from keras_kfc.maps.weights import VariableIndices, WeightMatrix
from keras_kfc.passes.records import LayerRecord


@dataclasses.dataclass(frozen=True)
class AnalysedBlock:
    """The block of one matrix of a layer.

    Args:
        path: Path of the matrix.
        matrix: The matrix.
        linear_map: It as a linear map.
        indices: Where its variables are in the list.
        eigenform: The block.
    """

    path: str
    matrix: WeightMatrix
    linear_map: LinearMap
    indices: VariableIndices
    eigenform: Eigenform

    @property
    def values(self) -> np.ndarray:
        """Eigenvalues, `(G, a, b)`."""
        return self.eigenform.values

    def coordinates(self, parts: Sequence[np.ndarray]) -> np.ndarray:
        """Coordinates, of the shape of `values`, of arrays of all variables' shapes."""
        own = {index: tf.constant(parts[index], tf.float64) for index in self.indices.every}
        return self.eigenform.coordinates(self.indices.stacked(self.linear_map, own).numpy())

    def weights(self, coordinates: np.ndarray) -> dict[int, np.ndarray]:
        """Kernel and bias with some coordinates, by their indices."""
        joint = tf.constant(self.eigenform.weights(coordinates))
        return self._by_index(joint)

    def diagonal(self) -> dict[int, np.ndarray]:
        """The diagonal of the block, by indices of the variables."""
        return self._by_index(tf.constant(self.eigenform.diagonal()))

    def _by_index(self, joint: tf.Tensor) -> dict[int, np.ndarray]:
        parts = self.indices.unstacked(self.linear_map, joint)
        return {index: part.numpy() for index, part in parts.items()}


def analysed_blocks(
    batches: Batches,
    variables: Sequence[Any],
    structure: str,
    fisher: str,
    seed: int,
    wanted: Callable[[LayerRecord], bool] = lambda record: True,
) -> list[AnalysedBlock]:
    """Measures the blocks of an instrumented model.

    Args:
        batches: The model, its loss and data.
        variables: The variables that blocks are over; matrices of others have none.
        structure: Name of a structure for matrices that have no choice of their own.
        fisher: One of `keras_kfc.losses.derivatives.FISHERS`.
        seed: Seed of random numbers.
        wanted: Which matrices get a block.
    """
    index_of = {id(variable): index for index, variable in enumerate(variables)}

    def layout_for(record: LayerRecord) -> Any:
        matrix = record.matrix
        indices = matrix.indices_in(index_of)
        if indices is None or not wanted(record):
            return None
        use_bias = indices.bias is not None
        kind = STRUCTURES[matrix.structure or structure]
        # As other packages have it: the partial traces are for the steps of training.
        sharing = "expand" if matrix.weight_sharing == "trace" else matrix.weight_sharing
        return kind.layout(record.linear_map, use_bias, None, sharing)

    measured = mean_moments(batches, fisher, seed, layout_for)
    refined = {
        id(part.matrix.kernel): part.layout.refined(part.moments)
        for part in measured
        if hasattr(part.layout, "refined")
    }
    if refined:

        def in_basis(record: LayerRecord) -> Any:
            return refined.get(id(record.matrix.kernel))

        # Once more, in a basis that the first pass over the data told.
        again = mean_moments(batches, fisher, seed, in_basis)
        better = {id(part.matrix.kernel): part for part in again}
        measured = [better.get(id(part.matrix.kernel), part) for part in measured]
    blocks = []
    for part in measured:
        matrix = part.matrix
        indices = matrix.indices_in(index_of)
        assert indices is not None  # what was measured is there
        eigenform = part.layout.eigenform(part.moments)
        blocks.append(AnalysedBlock(part.path, matrix, part.layout.linear_map, indices, eigenform))
    return blocks
