"""What the package needs of Keras's layers that has no public name. Read in Keras 3.15."""

from typing import Any

import keras
from keras.src.layers.rnn.conv_lstm import ConvLSTMCell

__all__ = ["ConvLSTMCell", "TellsWhenBuilt", "kernel_of", "table_of"]


class TellsWhenBuilt:
    """A mixin for layers that says when their variables are there.

    Keras wraps `build` of each instance, so that an unbuilt layer which gets another class would
    never run that of its new class.
    """

    def when_built(self) -> None:
        """What to do then; to be defined by the subclass."""

    def _post_build(self) -> None:
        super()._post_build()  # type: ignore[misc]
        self.when_built()


def kernel_of(layer: Any) -> keras.Variable:
    """The kernel variable itself, whatever `layer.kernel` derives from it (LoRA, quantisation)."""
    return layer._kernel


def table_of(layer: Any) -> keras.Variable:
    """The table of an embedding itself, likewise."""
    return layer._embeddings
