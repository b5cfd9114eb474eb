"""Normalisations that record what their scales are multiplied with."""

from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf
from keras import ops

from keras_kfc.layers.instrumented import KroneckerLayer, instruments
from keras_kfc.linalg.precision import at_least_float32
from keras_kfc.maps.scale import ScaleMap
from keras_kfc.maps.weights import WeightMatrix
from keras_kfc.passes.masks import positions_of


class ScalingLayer(KroneckerLayer):
    """What layers share that multiply channels by a scale and add a shift."""

    # Scale and shift of a channel: their whole Fisher matrix has two rows.
    curvature_structure = "full"
    without_matrices = "it has no trained scale or shift"

    def _scale_and_shift(self) -> tuple[Any, Any]:
        """The variables, or None for one that is not there."""
        raise AttributeError(f"{type(self).__name__} does not define its scale and shift")

    def _scaled_axes(self) -> tuple[int, ...]:
        """The axes of the layer's tensors that the variables have numbers for."""
        raise AttributeError(f"{type(self).__name__} does not define its axes")

    @property
    def weight_matrices(self) -> tuple[WeightMatrix, ...]:
        """Scale and shift as one matrix, or none if there is neither."""
        scale, shift = self._scale_and_shift()
        if scale is None and shift is None:
            return ()
        kernel, bias = (shift, None) if scale is None else (scale, shift)
        linear_map = ScaleMap(tuple(kernel.shape), self._scaled_axes())
        return (self._matrix(kernel, bias, linear_map),)

    def _observe_scaling(
        self, inputs: tf.Tensor, outputs: tf.Tensor, normalised: Callable[[], tf.Tensor]
    ) -> tf.Tensor:
        """Shows an open capture what was scaled.

        Args:
            inputs: The layer's input.
            outputs: Its output.
            normalised: Computes what is multiplied by the scale.
        """
        if not self.weight_matrices:
            return outputs
        keeps = self.weight_matrices[0].linear_map.keeps_positions
        mask = positions_of(inputs) if keeps else None
        scale, _ = self._scale_and_shift()
        multiplied = (lambda: tf.ones_like(outputs)) if scale is None else normalised
        return self._observe(multiplied, outputs, mask=mask)


@instruments(keras.layers.BatchNormalization)
@keras.saving.register_keras_serializable(package="keras_kfc")
class BatchNormalization(ScalingLayer, keras.layers.BatchNormalization):
    """`keras.layers.BatchNormalization`, which `keras_kfc.KFC` preconditions.

    With `renorm=True` it has no block. With `synchronized=True` each replica's factors are those of
    its own normalisation.

    Example:

    >>> layer = keras_kfc.layers.BatchNormalization()
    >>> layer(np.ones((2, 3), "float32")).shape
    TensorShape([2, 3])
    """

    @property
    def without_matrices(self) -> str:  # type: ignore[override]
        """Why the layer has no block, if it has none."""
        renorm = "its weights are no matrix with renorm=True"
        return renorm if self.renorm else super().without_matrices

    def _scale_and_shift(self) -> tuple[Any, Any]:
        return (None, None) if self.renorm else (self.gamma, self.beta)

    def _scaled_axes(self) -> tuple[int, ...]:
        return (self.axis,)

    def call(self, inputs: tf.Tensor, training: bool | None = None, mask: Any = None) -> Any:
        """Normalises, and records."""
        outputs = super().call(inputs, training=training, mask=mask)

        def normalised() -> tf.Tensor:
            images = at_least_float32(inputs)
            axis = self.axis % len(images.shape)
            if training and self.trainable:
                mean, variance = _moments_over_batch(images, axis, mask)
            else:
                mean, variance = self.moving_mean, self.moving_variance
            statistics = (ops.cast(part, images.dtype) for part in (mean, variance))
            return ops.batch_normalization(images, *statistics, axis, epsilon=self.epsilon)

        return self._observe_scaling(inputs, outputs, normalised)


def _moments_over_batch(
    images: tf.Tensor, axis: int, mask: tf.Tensor | None
) -> tuple[tf.Tensor, tf.Tensor]:
    """Mean and variance of each channel over all that a mask does not leave out."""
    others = [other for other in range(len(images.shape)) if other != axis]
    if mask is None:
        return tf.nn.moments(images, others)
    weights = tf.cast(mask, images.dtype)[..., None]
    return tf.nn.weighted_moments(images, others, weights)


@instruments(keras.layers.LayerNormalization)
@keras.saving.register_keras_serializable(package="keras_kfc")
class LayerNormalization(ScalingLayer, keras.layers.LayerNormalization):
    """`keras.layers.LayerNormalization`, which `keras_kfc.KFC` preconditions.

    Example:

    >>> layer = keras_kfc.layers.LayerNormalization()
    >>> layer(np.ones((2, 3), "float32")).shape
    TensorShape([2, 3])
    """

    def _scale_and_shift(self) -> tuple[Any, Any]:
        return self.gamma, self.beta

    def _scaled_axes(self) -> tuple[int, ...]:
        return tuple(self.axis)

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        """Normalises, and records."""

        def normalised() -> tf.Tensor:
            return ops.layer_normalization(
                at_least_float32(inputs),
                None,
                None,
                self.axis,
                self.epsilon,
                rms_scaling=self.rms_scaling,
            )

        return self._observe_scaling(inputs, super().call(inputs), normalised)


@instruments(keras.layers.RMSNormalization)
@keras.saving.register_keras_serializable(package="keras_kfc")
class RMSNormalization(ScalingLayer, keras.layers.RMSNormalization):
    """`keras.layers.RMSNormalization`, which `keras_kfc.KFC` preconditions.

    Example:

    >>> layer = keras_kfc.layers.RMSNormalization()
    >>> layer(np.ones((2, 3), "float32")).shape
    TensorShape([2, 3])
    """

    def _scale_and_shift(self) -> tuple[Any, Any]:
        return self.scale, None

    def _scaled_axes(self) -> tuple[int, ...]:
        return (self.axis,) if isinstance(self.axis, int) else tuple(self.axis)

    def call(self, x: tf.Tensor) -> tf.Tensor:
        """Normalises, and records."""

        def normalised() -> tf.Tensor:
            return ops.rms_normalization(
                at_least_float32(x), None, axis=self.axis, epsilon=self.epsilon
            )

        return self._observe_scaling(x, super().call(x), normalised)


@instruments(keras.layers.GroupNormalization)
@keras.saving.register_keras_serializable(package="keras_kfc")
class GroupNormalization(ScalingLayer, keras.layers.GroupNormalization):
    """`keras.layers.GroupNormalization`, which `keras_kfc.KFC` preconditions.

    Example:

    >>> layer = keras_kfc.layers.GroupNormalization(2)
    >>> layer(np.ones((2, 3, 4), "float32")).shape
    TensorShape([2, 3, 4])
    """

    def _scale_and_shift(self) -> tuple[Any, Any]:
        return self.gamma, self.beta

    def _scaled_axes(self) -> tuple[int, ...]:
        return (self.axis,)

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        """Normalises, and records."""

        def normalised() -> tf.Tensor:
            images = at_least_float32(inputs)
            rank = len(images.shape)
            axis = self.axis % rank
            order = [*(other for other in range(rank) if other != axis), axis]
            last = tf.transpose(images, order)
            sizes = (tf.shape(last)[0], -1, self.groups, last.shape[-1] // self.groups)
            groups = tf.reshape(last, sizes)
            mean, variance = tf.nn.moments(groups, (1, 3), keepdims=True)
            scaled = (groups - mean) * tf.math.rsqrt(variance + self.epsilon)
            scaled = tf.reshape(scaled, tf.shape(last))
            return tf.transpose(scaled, [order.index(place) for place in range(rank)])

        return self._observe_scaling(inputs, super().call(inputs), normalised)


@instruments(keras.layers.PReLU)
@keras.saving.register_keras_serializable(package="keras_kfc")
class PReLU(ScalingLayer, keras.layers.PReLU):
    """`keras.layers.PReLU`, which `keras_kfc.KFC` preconditions.

    Its slopes scale the negative parts of its inputs.

    Example:

    >>> layer = keras_kfc.layers.PReLU()
    >>> layer(np.ones((2, 3), "float32")).shape
    TensorShape([2, 3])
    """

    def _scale_and_shift(self) -> tuple[Any, Any]:
        return self.alpha, None

    def _scaled_axes(self) -> tuple[int, ...]:
        return tuple(range(1, len(self.alpha.shape) + 1))

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        """Multiplies negative parts by the slopes, and records."""
        outputs = super().call(inputs)
        return self._observe_scaling(inputs, outputs, lambda: tf.minimum(inputs, 0))
