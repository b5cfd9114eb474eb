"""What a layer kind is to the rest of the package.

A layer kind is a file in this folder with a subclass of `KroneckerLayer`
(`keras_kfc.layers.instrumented`) and of Keras's class, which `@instruments` registers.
"""

from collections.abc import Sequence
from typing import Any, Protocol

from keras_kfc.maps.weights import WeightMatrix


class LayerKind(Protocol):
    """A layer that reports its uses, as the curvature sees it."""

    @property
    def path(self) -> str:
        """Keras's path of the layer."""

    @property
    def weight_matrices(self) -> Sequence[WeightMatrix]:
        """The layer's matrices, whose kernels refer to the layer once they are built."""

    def call(self, inputs: Any) -> Any:
        """Computes what Keras's layer does, and sends each pre-activation through `_observe`."""
