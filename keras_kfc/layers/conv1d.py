"""The one-dimensional convolution that records its patches' statistics."""

import keras
import tensorflow as tf
from keras import ops

from keras_kfc.layers.convolution import GroupedConvolution
from keras_kfc.layers.instrumented import instruments
from keras_kfc.maps.conv1d import Conv1DMap


@instruments(keras.layers.Conv1D)
@keras.saving.register_keras_serializable(package="keras_kfc")
class Conv1D(GroupedConvolution, keras.layers.Conv1D):
    """`keras.layers.Conv1D`, which `keras_kfc.KFC` preconditions.

    Takes the arguments of `keras.layers.Conv1D` and has its configuration,
    weights and outputs. With `groups > 1` each group is a block of its own.

    Example:

    >>> layer = keras_kfc.layers.Conv1D(8, 3, padding="causal", activation="relu")
    >>> layer(np.ones((2, 5, 3), "float32")).shape
    TensorShape([2, 5, 8])
    """

    map_type = Conv1DMap

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        """Convolves, adds the bias, records, and applies the activation."""
        padded, padding = inputs, self.padding
        if padding == "causal":
            left = self.dilation_rate[0] * (self.kernel_size[0] - 1)
            axis = 1 if self.data_format == "channels_last" else 2
            padded = ops.pad(inputs, [(left if i == axis else 0, 0) for i in range(3)])
            padding = "valid"
        outputs = ops.conv(
            padded,
            self.kernel,
            strides=list(self.strides),
            padding=padding,
            dilation_rate=self.dilation_rate,
            data_format=self.data_format,
        )
        return self._completed(inputs, outputs)
