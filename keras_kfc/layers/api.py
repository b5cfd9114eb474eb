"""What a layer kind is to the rest of the package.

A layer kind is a file in this folder with a subclass of `KroneckerLayer`
(`keras_kfc.layers.instrumented`) and of Keras's class, which `@instruments` registers.
"""

from typing import Any, Protocol

import keras

from keras_kfc.maps.api import LinearMap


class LayerKind(Protocol):
    """A layer that reports its uses, as the curvature sees it."""

    @property
    def path(self) -> str:
        """Keras's path of the layer."""

    @property
    def kronecker_kernel(self) -> keras.Variable:
        """The kernel variable, which refers to the layer once this is built."""

    @property
    def bias(self) -> keras.Variable | None:
        """The bias variable, or None."""

    @property
    def linear_map(self) -> LinearMap:
        """The weights as a linear map."""

    @property
    def curvature_structure(self) -> str | None:
        """Name of the structure of the layer's block, or None for the optimizer's choice."""

    def call(self, inputs: Any) -> Any:
        """Computes what Keras's layer does, and sends the pre-activation through `_observe`."""
