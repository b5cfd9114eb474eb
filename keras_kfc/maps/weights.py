"""The variables that a linear map stands for."""

import dataclasses
from collections.abc import Mapping

import keras
import tensorflow as tf

from keras_kfc.maps.api import LinearMap


@dataclasses.dataclass(frozen=True, eq=False)
class WeightMatrix:
    """One matrix of a layer, which gets a Fisher block of its own.

    Args:
        kernel: The kernel variable, by which everybody knows the matrix.
        bias: The variable that holds the matrix's last row, or None.
        linear_map: Kernel and bias as a linear map.
        name: What tells it from the layer's other matrices; empty if there are none.
        structure: Name of its block's structure, or None for the optimizer's choice.
        weight_sharing: The setting for weights that an example uses at many positions,
            one of `keras_kfc.maps.sharing.WEIGHT_SHARING`, unless the optimizer says.
        further_kernels: Kernels whose rows follow those of `kernel`: the matrix multiplies their
            inputs, one after the other. All have two axes.
    """

    kernel: keras.Variable
    bias: keras.Variable | None
    linear_map: LinearMap
    name: str = ""
    structure: str | None = None
    weight_sharing: str = "expand"
    further_kernels: tuple[keras.Variable, ...] = ()

    @property
    def kernels(self) -> tuple[keras.Variable, ...]:
        """All kernels, in the order of their rows."""
        return (self.kernel, *self.further_kernels)

    def indices_in(self, index_of: Mapping[int, int]) -> "VariableIndices | None":
        """Where its variables are in a list, or None if a kernel is not there.

        Args:
            index_of: Indices of the list's variables, by their identity. A bias that is not there
                is left out.
        """
        if any(id(kernel) not in index_of for kernel in self.kernels):
            return None
        bias = None if self.bias is None else index_of.get(id(self.bias))
        rows = tuple(kernel.shape[0] for kernel in self.kernels)
        return VariableIndices(tuple(index_of[id(k)] for k in self.kernels), bias, rows)

    def path_in(self, layer: str) -> str:
        """Path of the matrix, for messages and names of variables.

        Args:
            layer: Path of the layer.
        """
        return f"{layer}/{self.name}" if self.name else layer


@dataclasses.dataclass(frozen=True)
class VariableIndices:
    """Where the variables of a matrix are in a list of variables.

    Args:
        kernels: Indices of its kernels.
        bias: Index of its bias, or None for a matrix without.
        rows: Length of the first axis of each kernel.
    """

    kernels: tuple[int, ...]
    bias: int | None
    rows: tuple[int, ...]

    @property
    def every(self) -> tuple[int, ...]:
        """All of them."""
        return self.kernels if self.bias is None else (*self.kernels, self.bias)

    def stacked(self, linear_map: LinearMap, tensors: Mapping[int, tf.Tensor]) -> tf.Tensor:
        """Joins a tensor for each variable, by index, to weights `(G, n, m)`."""
        parts = [tensors[index] for index in self.kernels]
        kernel = parts[0] if len(parts) == 1 else tf.concat(parts, axis=0)
        return linear_map.stack_bias(kernel, None if self.bias is None else tensors[self.bias])

    def unstacked(self, linear_map: LinearMap, weights: tf.Tensor) -> dict[int, tf.Tensor]:
        """Splits weights `(G, n, m)` into a tensor for each variable, by index."""
        kernel, bias = linear_map.unstack_bias(weights)
        parts = [kernel] if len(self.rows) == 1 else tf.split(kernel, self.rows)
        tensors = dict(zip(self.kernels, parts, strict=True))
        if self.bias is not None and bias is not None:
            tensors[self.bias] = bias
        return tensors
