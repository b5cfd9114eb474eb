"""Which trainable variables form a Fisher block."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from keras_kfc.layers.instrumented import layer_of_kernel
from keras_kfc.maps.weights import WeightMatrix


@dataclasses.dataclass(frozen=True)
class ParameterGroup:
    """Trainable variables that form one Fisher block.

    Args:
        path: Path of their matrix.
        matrix: The matrix.
        kernel: Index of its kernel among the variables.
        bias: Index of its bias, or None if that is not among them.
    """

    path: str
    matrix: WeightMatrix
    kernel: int
    bias: int | None


def parameter_groups(variables: Sequence[Any]) -> Iterator[ParameterGroup]:
    """The Fisher blocks that a list of trainable variables gives, in the order of their kernels.

    Args:
        variables: The variables.
    """
    indices = {id(variable): index for index, variable in enumerate(variables)}
    for index, variable in enumerate(variables):
        layer: Any = layer_of_kernel(variable)
        if layer is None:
            continue
        matrix = next(own for own in layer.weight_matrices if own.kernel is variable)
        bias = None if matrix.bias is None else indices.get(id(matrix.bias))
        yield ParameterGroup(matrix.path_in(layer.path), matrix, index, bias)
