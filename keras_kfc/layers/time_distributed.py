"""The wrapper that applies a layer to every step, in a way that a capture can look into."""

from typing import Any

import keras
import tensorflow as tf

from keras_kfc._compat.keras_internals import layers_within, set_mask, takes_mask, takes_training
from keras_kfc.layers.instrumented import (
    KroneckerLayer,
    capturing_class_of,
    couples_examples,
    instrument_layer,
    instruments,
    is_marked,
)
from keras_kfc.maps.weights import WeightMatrix
from keras_kfc.passes.automatic import active_capture


@instruments(keras.layers.TimeDistributed)
@keras.saving.register_keras_serializable(package="keras_kfc")
class TimeDistributed(KroneckerLayer, keras.layers.TimeDistributed):
    """`keras.layers.TimeDistributed`, whose layer `keras_kfc.KFC` preconditions.

    Where something is recorded, it applies the layer once, to all steps of all examples.

    Example:

    >>> layer = keras_kfc.layers.TimeDistributed(keras.layers.Dense(4))
    >>> layer(np.ones((2, 5, 3), "float32")).shape
    TensorShape([2, 5, 4])
    """

    layer: Any
    bias = None

    def __init__(self, layer: Any, **kwargs: Any):
        super().__init__(layer, **kwargs)
        if not couples_examples(self.layer):
            for own in layers_within(self.layer):
                if capturing_class_of(type(own)):
                    instrument_layer(own)

    @property
    def weight_matrices(self) -> tuple[WeightMatrix, ...]:
        """None: they are the inner layer's."""
        return ()

    def call(self, inputs: tf.Tensor, training: bool | None = None, mask: Any = None) -> Any:
        """Applies the layer to every step."""
        if not self._is_observed(mask):
            return super().call(inputs, training=training, mask=mask)
        shape = tf.shape(inputs)[:2]
        rows = _flat(inputs)
        if mask is not None:
            set_mask(rows, tf.reshape(mask, (-1,)))
        options = {"training": training} if takes_training(self.layer) else {}
        outputs = self.layer.call(rows, **options)
        steps = tf.reshape(outputs, tf.concat((shape, tf.shape(outputs)[1:]), axis=0))
        return tf.ensure_shape(steps, (*inputs.shape[:2], *outputs.shape[1:]))

    def _is_observed(self, mask: Any) -> bool:
        if couples_examples(self.layer) or (mask is not None and takes_mask(self.layer)):
            return False
        return any(
            active_capture(matrix.kernel) is not None
            for layer in layers_within(self.layer)
            if isinstance(layer, KroneckerLayer) and is_marked(layer)
            for matrix in layer.weight_matrices
        )


def _flat(steps: tf.Tensor) -> tf.Tensor:
    """`(B, T, ...)` as `(B * T, ...)`."""
    rows = tf.reshape(steps, tf.concat(([-1], tf.shape(steps)[2:]), axis=0))
    return tf.ensure_shape(rows, (None, *steps.shape[2:]))
