"""Depthwise and separable convolutions, which record what each channel sees."""

from typing import Any

import keras
import tensorflow as tf
from keras import ops

from keras_kfc.layers.convolution import Convolution
from keras_kfc.layers.instrumented import instruments
from keras_kfc.maps.conv import Conv2DMap
from keras_kfc.maps.conv1d import Conv1DMap
from keras_kfc.maps.depthwise import DepthwiseConv1DMap, DepthwiseConv2DMap
from keras_kfc.maps.weights import WeightMatrix


class _ByChannel(Convolution):
    """What depthwise and separable convolutions share, along one or two axes."""

    depth_multiplier: int

    def _depthwise_map(self, kernel: Any) -> Any:
        sizes: list[Any] = [self.kernel_size, self.strides, self.dilation_rate]
        sizes = [size[0] if self.rank == 1 else tuple(size) for size in sizes]
        kind: Any = DepthwiseConv1DMap if self.rank == 1 else DepthwiseConv2DMap
        return kind(
            kernel_size=sizes[0],
            inputs=kernel.shape[-2],
            depth_multiplier=self.depth_multiplier,
            strides=sizes[1],
            padding=self.padding,
            dilation_rate=sizes[2],
            data_format=self.data_format,
        )

    def _depthwise(self, inputs: tf.Tensor, kernel: Any) -> tf.Tensor:
        return ops.depthwise_conv(
            inputs,
            kernel,
            strides=self.strides,
            padding=self.padding,
            dilation_rate=self.dilation_rate,
            data_format=self.data_format,
        )


class _Depthwise(_ByChannel):
    kernel: Any

    @property
    def kronecker_kernel(self) -> keras.Variable:
        """The kernel variable."""
        return self.kernel

    @property
    def linear_map(self) -> Any:
        """The layer's `DepthwiseConv2DMap` or `DepthwiseConv1DMap`."""
        return self._depthwise_map(self.kernel)

    # A channel has few weights: their whole Fisher matrix is small.
    curvature_structure = "full"

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        """Convolves, adds the bias, records, and applies the activation."""
        return self._completed(inputs, self._depthwise(inputs, self.kernel))


class _Separable(_ByChannel):
    depthwise_kernel: Any
    pointwise_kernel: Any

    @property
    def weight_matrices(self) -> tuple[WeightMatrix, ...]:
        """The depthwise kernel, and the pointwise one with the bias."""
        channels, filters = self.pointwise_kernel.shape[-2:]
        pointwise: Any = (
            Conv1DMap(1, channels, filters, data_format=self.data_format)
            if self.rank == 1
            else Conv2DMap((1, 1), channels, filters, data_format=self.data_format)
        )
        depthwise = self._depthwise_map(self.depthwise_kernel)
        structure = self.curvature_structure or "full"
        return (
            WeightMatrix(self.depthwise_kernel, None, depthwise, "depthwise", structure),
            self._matrix(self.pointwise_kernel, self.bias, pointwise, "pointwise"),
        )

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        """Convolves twice, adds the bias, records both, and applies the activation."""
        between = self._observe(inputs, self._depthwise(inputs, self.depthwise_kernel), 0)
        outputs = ops.conv(
            between, self.pointwise_kernel, padding="valid", data_format=self.data_format
        )
        return self._completed(between, outputs, 1)


@instruments(keras.layers.DepthwiseConv1D)
@keras.saving.register_keras_serializable(package="keras_kfc")
class DepthwiseConv1D(_Depthwise, keras.layers.DepthwiseConv1D):
    """`keras.layers.DepthwiseConv1D`, which `keras_kfc.KFC` preconditions.

    Example:

    >>> layer = keras_kfc.layers.DepthwiseConv1D(3, padding="same")
    >>> layer(np.ones((2, 5, 3), "float32")).shape
    TensorShape([2, 5, 3])
    """


@instruments(keras.layers.DepthwiseConv2D)
@keras.saving.register_keras_serializable(package="keras_kfc")
class DepthwiseConv2D(_Depthwise, keras.layers.DepthwiseConv2D):
    """`keras.layers.DepthwiseConv2D`, which `keras_kfc.KFC` preconditions.

    Example:

    >>> layer = keras_kfc.layers.DepthwiseConv2D(3, padding="same")
    >>> layer(np.ones((2, 5, 5, 3), "float32")).shape
    TensorShape([2, 5, 5, 3])
    """


@instruments(keras.layers.SeparableConv1D)
@keras.saving.register_keras_serializable(package="keras_kfc")
class SeparableConv1D(_Separable, keras.layers.SeparableConv1D):
    """`keras.layers.SeparableConv1D`, which `keras_kfc.KFC` preconditions.

    Example:

    >>> layer = keras_kfc.layers.SeparableConv1D(4, 3)
    >>> layer(np.ones((2, 5, 3), "float32")).shape
    TensorShape([2, 3, 4])
    """


@instruments(keras.layers.SeparableConv2D)
@keras.saving.register_keras_serializable(package="keras_kfc")
class SeparableConv2D(_Separable, keras.layers.SeparableConv2D):
    """`keras.layers.SeparableConv2D`, which `keras_kfc.KFC` preconditions.

    Example:

    >>> layer = keras_kfc.layers.SeparableConv2D(4, 3)
    >>> layer(np.ones((2, 5, 5, 3), "float32")).shape
    TensorShape([2, 3, 3, 4])
    """
