"""The three-dimensional convolution that records its patches' statistics."""

import keras
import tensorflow as tf
from keras import ops

from keras_kfc.layers.instrumented import KroneckerLayer, instruments
from keras_kfc.maps.conv3d import Conv3DMap


@instruments(keras.layers.Conv3D)
@keras.saving.register_keras_serializable(package="keras_kfc")
class Conv3D(KroneckerLayer, keras.layers.Conv3D):
    """`keras.layers.Conv3D`, which `keras_kfc.KFC` preconditions.

    Takes the arguments of `keras.layers.Conv3D` and has its configuration,
    weights and outputs. With `groups > 1` each group is a block of its own.

    Example:

    >>> layer = keras_kfc.layers.Conv3D(8, 3, padding="same", activation="relu")
    >>> layer(np.ones((2, 5, 4, 4, 3), "float32")).shape
    TensorShape([2, 5, 4, 4, 8])
    """

    @property
    def linear_map(self) -> Conv3DMap:
        """The convolution's `Conv3DMap`."""
        *kernel_size, channels, filters = self.kronecker_kernel.shape
        return Conv3DMap(
            kernel_size=tuple(kernel_size),
            inputs=channels * self.groups,
            outputs=filters,
            strides=tuple(self.strides),
            padding=self.padding,
            dilation_rate=tuple(self.dilation_rate),
            groups=self.groups,
            data_format=self.data_format,
        )

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        """Convolves, adds the bias, records, and applies the activation."""
        outputs = self.convolution_op(inputs, self.kernel)
        if self.use_bias:
            channels_last = self.data_format == "channels_last"
            shape = (1, 1, 1, 1, self.filters) if channels_last else (1, self.filters, 1, 1, 1)
            outputs = ops.add(outputs, ops.reshape(self.bias, shape))
        outputs = self._observe(inputs, outputs)
        return outputs if self.activation is None else self.activation(outputs)
