"""The dense layer that records its inputs."""

import keras
import tensorflow as tf
from keras import ops

from keras_kfc.layers.instrumented import KroneckerLayer, instruments
from keras_kfc.maps.dense import DenseMap


@instruments(keras.layers.Dense)
@keras.saving.register_keras_serializable(package="keras_kfc")
class Dense(KroneckerLayer, keras.layers.Dense):
    """`keras.layers.Dense`, which `keras_kfc.KFC` preconditions.

    Takes the arguments of `keras.layers.Dense` and has its configuration,
    weights and outputs, on inputs of any rank.

    Example:

    >>> layer = keras_kfc.layers.Dense(4, activation="tanh")
    >>> layer(np.ones((2, 3), "float32")).shape
    TensorShape([2, 4])
    """

    can_be_quantised = True

    @property
    def linear_map(self) -> DenseMap:
        """The layer's `DenseMap`."""
        return DenseMap(*self.kronecker_kernel.shape)

    def call(self, inputs: tf.Tensor, training: bool | None = None) -> tf.Tensor:
        """Multiplies, adds the bias, records, and applies the activation."""
        outputs = ops.matmul(inputs, self.kernel)
        if self.bias is not None:
            outputs = ops.add(outputs, self.bias)
        outputs = self._observe(inputs, outputs)
        return outputs if self.activation is None else self.activation(outputs)
