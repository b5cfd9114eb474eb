"""Transposed convolutions that record what their outputs see."""

from typing import Any

import keras
import tensorflow as tf
from keras import ops

from keras_kfc.layers.convolution import Convolution
from keras_kfc.layers.instrumented import instruments
from keras_kfc.maps.conv_transpose import ConvTransposeMap


class _Transposed(Convolution):
    """What transposed convolutions share, whatever their number of axes."""

    kernel: Any
    filters: int
    output_padding: Any

    @property
    def kronecker_kernel(self) -> keras.Variable:
        """The kernel variable."""
        return self.kernel

    @property
    def linear_map(self) -> ConvTransposeMap:
        """The layer's `ConvTransposeMap`."""
        extra = self.output_padding
        if isinstance(extra, int):
            extra = (extra,) * self.rank
        return ConvTransposeMap(
            tuple(self.kernel_size),
            self.kernel.shape[-1],
            self.filters,
            tuple(self.strides),
            self.padding,
            None if extra is None else tuple(extra),
            tuple(self.dilation_rate),
            self.data_format,
        )

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        """Convolves, adds the bias, records, and applies the activation."""
        outputs = ops.conv_transpose(
            inputs,
            self.kernel,
            strides=list(self.strides),
            padding=self.padding,
            output_padding=self.output_padding,
            dilation_rate=self.dilation_rate,
            data_format=self.data_format,
        )
        return self._completed(inputs, outputs)


@instruments(keras.layers.Conv1DTranspose)
@keras.saving.register_keras_serializable(package="keras_kfc")
class Conv1DTranspose(_Transposed, keras.layers.Conv1DTranspose):
    """`keras.layers.Conv1DTranspose`, which `keras_kfc.KFC` preconditions.

    Example:

    >>> layer = keras_kfc.layers.Conv1DTranspose(4, 3, strides=2, padding="same")
    >>> layer(np.ones((2, 5, 3), "float32")).shape
    TensorShape([2, 10, 4])
    """


@instruments(keras.layers.Conv2DTranspose)
@keras.saving.register_keras_serializable(package="keras_kfc")
class Conv2DTranspose(_Transposed, keras.layers.Conv2DTranspose):
    """`keras.layers.Conv2DTranspose`, which `keras_kfc.KFC` preconditions.

    Example:

    >>> layer = keras_kfc.layers.Conv2DTranspose(4, 3, strides=2, padding="same")
    >>> layer(np.ones((2, 5, 5, 3), "float32")).shape
    TensorShape([2, 10, 10, 4])
    """


@instruments(keras.layers.Conv3DTranspose)
@keras.saving.register_keras_serializable(package="keras_kfc")
class Conv3DTranspose(_Transposed, keras.layers.Conv3DTranspose):
    """`keras.layers.Conv3DTranspose`, which `keras_kfc.KFC` preconditions.

    Example:

    >>> layer = keras_kfc.layers.Conv3DTranspose(4, 3, strides=2, padding="same")
    >>> layer(np.ones((2, 3, 4, 5, 3), "float32")).shape
    TensorShape([2, 6, 8, 10, 4])
    """
