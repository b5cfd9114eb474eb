"""The test problems that the defaults of KFC are chosen on.

Each problem is a model with its data; `build` gives the same initial weights
every time. All use real images: Fashion-MNIST from IDX files, and the digits
that scikit-learn ships.
"""

import dataclasses
from collections.abc import Callable

import keras
import numpy as np
from keras import layers

from examples.data import load_digits, load_fashion_mnist
from examples.nets import digits_net, fashion_net


@dataclasses.dataclass
class Problem:
    """A training problem.

    Args:
        name: Short name.
        build: Function that makes the (uncompiled) model with fixed initial weights.
        loss: Its Keras loss.
        inputs: Training inputs.
        targets: Training targets.
        batch_size: Mini-batch size.
        evaluation: Number of training examples that the reported loss is measured on.
    """

    name: str
    build: Callable[[], keras.Model]
    loss: str
    inputs: np.ndarray
    targets: np.ndarray
    batch_size: int = 256
    evaluation: int = 10_000


def mlp() -> keras.Model:
    """A rectifier network 784-256-128-10."""
    keras.utils.set_random_seed(1)
    return keras.Sequential(
        [
            keras.Input((28, 28, 1)),
            layers.Flatten(),
            layers.Dense(256, activation="relu", kernel_initializer="he_normal"),
            layers.Dense(128, activation="relu", kernel_initializer="he_normal"),
            layers.Dense(10, activation="softmax"),
        ]
    )


def autoencoder() -> keras.Model:
    """A tanh autoencoder 784-256-64-12-64-256-784 with a linear code."""
    keras.utils.set_random_seed(1)
    stack: list[keras.Layer] = [keras.Input((784,))]
    for units in (256, 64):
        stack.append(layers.Dense(units, activation="tanh"))
    stack.append(layers.Dense(12))
    for units in (64, 256):
        stack.append(layers.Dense(units, activation="tanh"))
    return keras.Sequential([*stack, layers.Dense(784)])


def problems(data_dir: str | None = None, examples: int = 20_000) -> dict[str, Problem]:
    """All test problems by name.

    Args:
        data_dir: Folder of the Fashion-MNIST IDX files, or None for `keras.datasets`.
        examples: Number of Fashion-MNIST training images to use.
    """
    fashion = load_fashion_mnist(data_dir)
    images, labels = fashion.train_images[:examples], fashion.train_labels[:examples]
    flat = images.reshape(len(images), -1)
    digits = load_digits()
    crossentropy = "sparse_categorical_crossentropy"
    return {
        problem.name: problem
        for problem in (
            Problem("conv", fashion_net, crossentropy, images, labels),
            Problem("conv-bn", lambda: fashion_net(batch_norm=True), crossentropy, images, labels),
            Problem("mlp", mlp, crossentropy, images, labels),
            Problem("autoencoder", autoencoder, "mean_squared_error", flat, flat),
            Problem(
                "digits",
                digits_net,
                crossentropy,
                digits.train_images,
                digits.train_labels,
                batch_size=64,
            ),
        )
    }
