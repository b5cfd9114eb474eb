"""Which trainable variables form a Fisher block."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from keras_kfc.layers.instrumented import layer_of_kernel
from keras_kfc.maps.weights import VariableIndices, WeightMatrix


@dataclasses.dataclass(frozen=True)
class ParameterGroup:
    """Trainable variables that form one Fisher block.

    Args:
        path: Path of their matrix.
        matrix: The matrix.
        indices: Where its variables are in the list; a bias that is not there is left out.
    """

    path: str
    matrix: WeightMatrix
    indices: VariableIndices


def parameter_groups(variables: Sequence[Any]) -> Iterator[ParameterGroup]:
    """The Fisher blocks that a list of trainable variables gives, in the order of their kernels.

    Args:
        variables: The variables.
    """
    index_of = {id(variable): index for index, variable in enumerate(variables)}
    for variable in variables:
        layer: Any = layer_of_kernel(variable)
        if layer is None:
            continue
        matrix = next(own for own in layer.weight_matrices if own.kernel is variable)
        own = matrix.indices_in(index_of)
        if own is not None:
            yield ParameterGroup(matrix.path_in(layer.path), matrix, own)
