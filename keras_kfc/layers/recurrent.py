"""Recurrent layers whose loop over time a capture can look into.

They have no weights of their own, those are the cell's: of a kind in `keras_kfc.layers.cells`, or
any cell with instrumented layers inside. Where nothing is recorded, they are Keras's own layers.
Where something is, the loop runs as `keras_kfc.passes.loops` has it, without unrolling and without
the fused kernels of cuDNN, which do not let anyone look inside.
"""

from typing import Any

import keras

from keras_kfc._compat.keras_internals import layers_within, takes_training
from keras_kfc.layers.instrumented import (
    KroneckerLayer,
    capturing_class_of,
    instrument_layer,
    instruments,
    is_marked,
)
from keras_kfc.maps.weights import WeightMatrix
from keras_kfc.passes.automatic import active_capture
from keras_kfc.passes.loops import Loop, captured_loop, recorder_of_loop


class RecurrentLayer(KroneckerLayer):
    """What recurrent layers share."""

    cell: Any
    go_backwards: bool
    zero_output_for_mask: bool
    bias = None

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        for layer in _layers_of(self.cell):
            if capturing_class_of(type(layer)):
                instrument_layer(layer)

    @property
    def weight_matrices(self) -> tuple[WeightMatrix, ...]:
        """None: they are the cell's."""
        return ()

    def inner_loop(
        self, sequences: Any, initial_state: Any, mask: Any, training: Any = False
    ) -> Any:
        """Runs the cell over time, and shows an open capture what it does."""
        capture = self._capture()
        if capture is None:
            return super().inner_loop(  # type: ignore[misc]
                sequences, initial_state, mask=mask, training=training
            )
        options = {"training": training} if _takes_training(self.cell) else {}

        def cell(inputs: Any, states: Any) -> tuple[Any, Any]:
            output, new = self.cell(inputs, states, **options)
            return output, new if keras.tree.is_nested(new) else [new]

        nested = keras.tree.is_nested(initial_state)
        states = initial_state if nested else [initial_state]
        mask = mask[0] if keras.tree.is_nested(mask) else mask
        loop = Loop(cell, sequences, states, mask, self.go_backwards, self.zero_output_for_mask)
        return captured_loop(capture, loop)

    def _capture(self) -> Any:
        """The capture that is to see the loop, or None."""
        if recorder_of_loop() is not None:
            # A loop in a loop is out of reach.
            return None
        for layer in _layers_of(self.cell):
            if isinstance(layer, KroneckerLayer) and is_marked(layer):
                for matrix in layer.weight_matrices:
                    capture = active_capture(matrix.kernel)
                    if capture is not None:
                        return capture
        return None


def _layers_of(cell: Any) -> list[keras.Layer]:
    return list(layers_within(cell)) if isinstance(cell, keras.Layer) else []


def _takes_training(cell: Any) -> bool:
    return isinstance(cell, keras.Layer) and takes_training(cell)


def _recurrent(plain: type, example: str) -> type:
    """The recording subclass of one of Keras's recurrent layers."""
    name = plain.__name__
    text = f"""`keras.layers.{name}`, whose cell `keras_kfc.KFC` preconditions.

    Example:

    >>> layer = keras_kfc.layers.{example}
    """
    kind = type(name, (RecurrentLayer, plain), {"__doc__": text, "__module__": __name__})
    register = keras.saving.register_keras_serializable(package="keras_kfc")
    return instruments(plain)(register(kind))


RNN = _recurrent(keras.layers.RNN, "RNN(keras.layers.LSTMCell(4))")
SimpleRNN = _recurrent(keras.layers.SimpleRNN, "SimpleRNN(4)")
LSTM = _recurrent(keras.layers.LSTM, "LSTM(4)")
GRU = _recurrent(keras.layers.GRU, "GRU(4)")
ConvLSTM1D = _recurrent(keras.layers.ConvLSTM1D, "ConvLSTM1D(4, 3)")
ConvLSTM2D = _recurrent(keras.layers.ConvLSTM2D, "ConvLSTM2D(4, 3)")
ConvLSTM3D = _recurrent(keras.layers.ConvLSTM3D, "ConvLSTM3D(4, 3)")
