"""The variables that a linear map stands for."""

import dataclasses

import keras

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
            `"expand"` or `"reduce"` (`keras_kfc.maps.sharing`), unless the optimizer says.
    """

    kernel: keras.Variable
    bias: keras.Variable | None
    linear_map: LinearMap
    name: str = ""
    structure: str | None = None
    weight_sharing: str = "expand"

    def path_in(self, layer: str) -> str:
        """Path of the matrix, for messages and names of variables.

        Args:
            layer: Path of the layer.
        """
        return f"{layer}/{self.name}" if self.name else layer
