"""The networks of the measurements beside those of the examples.

Each function takes the shape of one input, the number of classes, and the seed of its
initial weights, and makes a model that is not compiled.
"""

from collections.abc import Sequence

import keras
from keras import layers


def cuda_convnet(
    shape: Sequence[int], classes: int = 10, seed: int = 1, batch_norm: bool = False
) -> keras.Model:
    """Three 5x5 convolutions of 32, 32 and 64 filters with pooling, and one dense layer.

    The kind of network that Grosse & Martens (2016), section 5, train on CIFAR-10 and SVHN.
    """
    keras.utils.set_random_seed(seed)
    stack: list[keras.Layer] = [keras.Input(tuple(shape))]
    for filters in (32, 32, 64):
        stack.append(layers.Conv2D(filters, 5, padding="same", kernel_initializer="he_normal"))
        if batch_norm:
            stack.append(layers.BatchNormalization(momentum=0.9))
        stack += [layers.ReLU(), layers.MaxPooling2D(3, 2, padding="same")]
    stack += [layers.Flatten(), layers.Dense(classes), layers.Softmax()]
    return keras.Sequential(stack)


def resnet20(shape: Sequence[int] = (32, 32, 3), classes: int = 10, seed: int = 1) -> keras.Model:
    """The residual network of 20 layers for small images, with batch normalisation."""
    keras.utils.set_random_seed(seed)

    def normalised(tensor, filters, kernel, stride=1):
        convolution = layers.Conv2D(
            filters,
            kernel,
            strides=stride,
            padding="same",
            use_bias=False,
            kernel_initializer="he_normal",
        )
        return layers.BatchNormalization(momentum=0.9)(convolution(tensor))

    inputs = keras.Input(tuple(shape))
    tensor = layers.ReLU()(normalised(inputs, 16, 3))
    for stage, filters in enumerate((16, 32, 64)):
        for block in range(3):
            stride = 2 if stage and not block else 1
            branch = layers.ReLU()(normalised(tensor, filters, 3, stride))
            branch = normalised(branch, filters, 3)
            if stride > 1:
                tensor = normalised(tensor, filters, 1, stride)
            tensor = layers.ReLU()(layers.Add()([tensor, branch]))
    outputs = layers.Dense(classes, activation="softmax")(layers.GlobalAveragePooling2D()(tensor))
    return keras.Model(inputs, outputs)


def mlp(shape: Sequence[int], classes: int = 10, seed: int = 1) -> keras.Model:
    """A rectifier network with 256 and 128 hidden units."""
    keras.utils.set_random_seed(seed)
    hidden = [
        layers.Dense(units, activation="relu", kernel_initializer="he_normal")
        for units in (256, 128)
    ]
    ends = [layers.Dense(classes, activation="softmax")]
    return keras.Sequential([keras.Input(tuple(shape)), layers.Flatten(), *hidden, *ends])


def autoencoder(shape: Sequence[int], seed: int = 1) -> keras.Model:
    """The autoencoder n-1000-500-250-30-250-500-1000-n with a linear code, for inputs in [0, 1].

    The network of Hinton & Salakhutdinov (2006) that Martens & Grosse (2015), section 13,
    train, here with tanh units.
    """
    keras.utils.set_random_seed(seed)
    size = shape[0]
    encoder = [layers.Dense(units, activation="tanh") for units in (1000, 500, 250)]
    decoder = [layers.Dense(units, activation="tanh") for units in (250, 500, 1000)]
    ends = [layers.Dense(size, activation="sigmoid")]
    return keras.Sequential(
        [keras.Input(tuple(shape)), *encoder, layers.Dense(30), *decoder, *ends]
    )


def small_autoencoder(shape: Sequence[int], seed: int = 1) -> keras.Model:
    """A tanh autoencoder n-256-64-12-64-256-n, linear at the code and the output."""
    keras.utils.set_random_seed(seed)
    encoder = [layers.Dense(units, activation="tanh") for units in (256, 64)]
    decoder = [layers.Dense(units, activation="tanh") for units in (64, 256)]
    ends = [layers.Dense(shape[0])]
    return keras.Sequential(
        [keras.Input(tuple(shape)), *encoder, layers.Dense(12), *decoder, *ends]
    )
