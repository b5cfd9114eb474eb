"""Convolutions that record their patches' statistics."""

import keras

from keras_kfc.layers.convolution import GroupedConvolution
from keras_kfc.layers.instrumented import instruments
from keras_kfc.maps.conv import Conv2DMap


@instruments(keras.layers.Conv2D)
@keras.saving.register_keras_serializable(package="keras_kfc")
class Conv2D(GroupedConvolution, keras.layers.Conv2D):
    """`keras.layers.Conv2D`, which `keras_kfc.KFC` preconditions.

    Takes the arguments of `keras.layers.Conv2D` and has its configuration,
    weights and outputs. With `groups > 1` each group is a block of its own.

    Example:

    >>> layer = keras_kfc.layers.Conv2D(8, 3, padding="same", activation="relu")
    >>> layer(np.ones((2, 5, 5, 3), "float32")).shape
    TensorShape([2, 5, 5, 8])
    """

    map_type = Conv2DMap
