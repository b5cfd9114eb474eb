"""The networks of the examples and benchmarks, with the same initial weights for a seed."""

import keras
from keras import layers


def digits_net(seed: int = 1) -> keras.Model:
    """A small conv net for 8x8 digits: two convolutions, dropout, one dense layer."""
    keras.utils.set_random_seed(seed)
    return keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            layers.Conv2D(16, 3, padding="same", activation="relu"),
            layers.MaxPooling2D(),
            layers.Conv2D(32, 3, padding="same", activation="relu"),
            layers.Flatten(),
            layers.Dropout(0.3),
            layers.Dense(10, activation="softmax"),
        ]
    )


def digits_autoencoder(seed: int = 1) -> keras.Model:
    """A deep autoencoder for the 64 pixels of a digit: 256-128-64-6-64-128-256 units."""
    keras.utils.set_random_seed(seed)
    widths = (256, 128, 64)
    stack: list[keras.Layer] = [keras.Input((64,))]
    stack += [layers.Dense(width, activation="tanh") for width in widths]
    stack.append(layers.Dense(6))
    stack += [layers.Dense(width, activation="tanh") for width in reversed(widths)]
    stack.append(layers.Dense(64, activation="sigmoid"))
    return keras.Sequential(stack)


def fashion_net(seed: int = 1, batch_norm: bool = False) -> keras.Model:
    """A conv net of the paper's kind for 28x28 images: three convolutions, one dense layer."""
    keras.utils.set_random_seed(seed)
    stack: list[keras.Layer] = [keras.Input((28, 28, 1))]
    for filters, kernel, pool in ((16, 5, 3), (32, 5, 3), (32, 3, 2)):
        stack.append(layers.Conv2D(filters, kernel, padding="same", kernel_initializer="he_normal"))
        if batch_norm:
            # The average of Keras (0.99) lags a hundred iterations behind, which is where KFC ends.
            stack.append(layers.BatchNormalization(momentum=0.9))
        stack += [layers.ReLU(), layers.MaxPooling2D(pool, 2, padding="same")]
    stack += [layers.Flatten(), layers.Dense(10, kernel_initializer="he_normal")]
    stack.append(layers.Softmax())
    return keras.Sequential(stack)
