"""The dense layer along any axes, which records its inputs; attention is made of it."""

import math
from typing import Any

import keras
import tensorflow as tf
from keras import ops

from keras_kfc.layers.instrumented import KroneckerLayer, instruments
from keras_kfc.maps.einsum import EinsumMap, labels_of
from keras_kfc.maps.weights import WeightMatrix


@instruments(keras.layers.EinsumDense)
@keras.saving.register_keras_serializable(package="keras_kfc")
class EinsumDense(KroneckerLayer, keras.layers.EinsumDense):
    """`keras.layers.EinsumDense`, which `keras_kfc.KFC` preconditions.

    Takes the arguments of `keras.layers.EinsumDense` and has its configuration,
    weights and outputs. An equation that is no product of matrices over shared axes has no block,
    nor has a bias that does not have a number for each output.

    `keras.layers.MultiHeadAttention` and `keras.layers.GroupQueryAttention` hold such layers.

    Example:

    >>> layer = keras_kfc.layers.EinsumDense("abc,cde->abde", (None, 2, 4), bias_axes="de")
    >>> layer(np.ones((2, 3, 5), "float32")).shape
    TensorShape([2, 3, 2, 4])
    """

    can_be_quantised = True
    without_matrices = "its equation is no product of matrices"

    @property
    def linear_map(self) -> EinsumMap:
        """The layer's `EinsumMap`.

        Raises:
            ValueError: If the equation is no product of matrices.
        """
        kernel_shape = tuple(self.kronecker_kernel.shape)
        labels = labels_of(self.equation, self.input_spec.ndim)
        linear_map = EinsumMap(*labels, kernel_shape)
        bias = None if self.bias is None else tuple(self.bias.shape)
        if bias is None or math.prod(bias) != linear_map.outputs or not self._bias_is_of_outputs:
            return linear_map
        return EinsumMap(*labels, kernel_shape, bias)

    @property
    def _bias_is_of_outputs(self) -> bool:
        _, kernel, outputs = labels_of(self.equation, self.input_spec.ndim)
        return set(self.bias_axes) == {label for label in outputs if label in kernel}

    @property
    def weight_matrices(self) -> tuple[WeightMatrix, ...]:
        """The kernel, with the bias if that has a number for each output."""
        try:
            linear_map = self.linear_map
        except ValueError:
            return ()
        bias = None if linear_map.bias_shape is None else self.bias
        return (self._matrix(self.kronecker_kernel, bias, linear_map),)

    def call(self, inputs: tf.Tensor, training: bool | None = None) -> Any:
        """Multiplies, adds the bias, records, and applies the activation."""
        outputs = ops.einsum(self.equation, inputs, self.kernel)
        if self.bias is not None:
            outputs = ops.add(outputs, self.bias)
        if self.weight_matrices:
            outputs = self._observe(inputs, outputs)
        return outputs if self.activation is None else self.activation(outputs)
