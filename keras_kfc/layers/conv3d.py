"""The three-dimensional convolution that records its patches' statistics."""

import keras

from keras_kfc.layers.convolution import GroupedConvolution
from keras_kfc.layers.instrumented import instruments
from keras_kfc.maps.conv3d import Conv3DMap


@instruments(keras.layers.Conv3D)
@keras.saving.register_keras_serializable(package="keras_kfc")
class Conv3D(GroupedConvolution, keras.layers.Conv3D):
    """`keras.layers.Conv3D`, which `keras_kfc.KFC` preconditions.

    Takes the arguments of `keras.layers.Conv3D` and has its configuration,
    weights and outputs. With `groups > 1` each group is a block of its own.

    Example:

    >>> layer = keras_kfc.layers.Conv3D(8, 3, padding="same", activation="relu")
    >>> layer(np.ones((2, 5, 4, 4, 3), "float32")).shape
    TensorShape([2, 5, 4, 4, 8])
    """

    map_type = Conv3DMap
