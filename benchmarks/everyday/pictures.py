"""Tasks on images that are no classification: masks, boxes, noise, codes."""

import keras
import numpy as np
from keras import layers, ops

from benchmarks.everyday.classification import digits
from benchmarks.everyday.task import Task, register, split


def _blobs(rng):
    """Noisy images `(N, 16, 16, 1)` of one or two discs, and their masks."""
    grid = np.stack(np.meshgrid(np.arange(16), np.arange(16), indexing="ij"), -1)
    centres = rng.uniform(3, 13, size=(600, 2, 1, 1, 2))
    radii = rng.uniform(1.5, 3.5, size=(600, 2, 1, 1)) * (
        rng.random((600, 2, 1, 1)) < [[[1.0]], [[0.5]]]
    )
    masks = (np.linalg.norm(grid - centres, axis=-1) < radii).any(1)[..., None]
    images = masks + 0.7 * rng.normal(size=masks.shape)
    return split(images.astype("float32"), masks.astype("float32"), 100)


def _masker():
    return keras.Sequential(
        [
            keras.Input((16, 16, 1)),
            layers.Conv2D(8, 3, padding="same", activation="relu"),
            layers.Conv2D(8, 3, padding="same", activation="relu"),
            layers.Conv2D(1, 1, activation="sigmoid"),
        ]
    )


def dice(y_true, y_pred):
    """One minus the overlap of two masks, over the batch."""
    y_true, y_pred = ops.reshape(y_true, (-1,)), ops.reshape(y_pred, (-1,))
    both = 2 * ops.sum(y_true * y_pred) + 1
    return 1 - both / (ops.sum(y_true) + ops.sum(y_pred) + 1)


def _boxes(rng):
    """Images of a bright frame or disc; its class and its box."""
    kind = rng.integers(0, 2, 1200)
    size, (top, left) = rng.integers(4, 9, 1200), rng.integers(0, 8, size=(2, 1200))
    images = 0.3 * rng.normal(size=(1200, 16, 16, 1))
    for image, shape, length, y, x in zip(images, kind, size, top, left, strict=True):
        patch = np.ones((length, length))
        if shape:
            patch[1:-1, 1:-1] = 0
        image[y : y + length, x : x + length, 0] += patch[: 16 - y, : 16 - x]
    box = np.stack([top, left, top + size, left + size], 1) / 16
    y = {"kind": kind[:, None].astype("float32"), "box": box.astype("float32")}
    return split(images.astype("float32"), y, 200)


def _detector():
    inputs = keras.Input((16, 16, 1))
    hidden = layers.Conv2D(8, 3, strides=2, activation="relu")(inputs)
    hidden = layers.Conv2D(16, 3, activation="relu")(hidden)
    hidden = layers.Dense(48, "relu")(layers.Flatten()(hidden))
    outputs = {
        "kind": layers.Dense(1, "sigmoid", name="kind")(hidden),
        "box": layers.Dense(4, name="box")(hidden),
    }
    return keras.Model(inputs, outputs)


def _noisy_digits(rng):
    images, _ = digits()
    images = images[rng.permutation(len(images))]
    noisy = images + 0.4 * rng.normal(size=images.shape)
    return split(noisy.astype("float32"), images, 360)


def _denoiser():
    return keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            layers.Conv2D(16, 3, padding="same", activation="relu"),
            layers.Conv2D(16, 3, padding="same", activation="relu"),
            layers.Conv2D(1, 3, padding="same"),
        ]
    )


def _digits_to_themselves(rng):
    images, _ = digits()
    rows = images[rng.permutation(len(images))].reshape(-1, 64)
    return split(rows, rows, 360)


def _autoencoder():
    stack = [keras.Input((64,))]
    for units in (64, 32):
        stack.append(layers.Dense(units, "tanh"))
    stack.append(layers.Dense(8))
    for units in (32, 64):
        stack.append(layers.Dense(units, "tanh"))
    return keras.Sequential([*stack, layers.Dense(64)])


class Kullback(layers.Layer):
    """Draws a code from mean and log variance, and adds its divergence from a standard normal."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.generator = keras.random.SeedGenerator(1)

    def call(self, moments):
        """Draws."""
        mean, log_variance = moments
        divergence = ops.sum(1 + log_variance - mean**2 - ops.exp(log_variance), -1)
        self.add_loss(-0.5 / 64 * ops.mean(divergence))
        noise = keras.random.normal(ops.shape(mean), seed=self.generator)
        return mean + ops.exp(0.5 * log_variance) * noise


def _vae():
    inputs = keras.Input((64,))
    hidden = layers.Dense(64, "relu")(inputs)
    code = Kullback()([layers.Dense(8)(hidden), layers.Dense(8)(hidden)])
    hidden = layers.Dense(64, "relu")(code)
    return keras.Model(inputs, layers.Dense(64, "sigmoid")(hidden))


def _upsampling_data(rng):
    images, _ = digits()
    images = images[rng.permutation(len(images))]
    small = images.reshape(-1, 4, 2, 4, 2, 1).mean((2, 4))
    return split(small, images, 360)


def _upsampler():
    return keras.Sequential(
        [
            keras.Input((4, 4, 1)),
            layers.Conv2D(16, 3, padding="same", activation="relu"),
            layers.Conv2DTranspose(16, 3, strides=2, padding="same", activation="relu"),
            layers.Conv2D(1, 3, padding="same"),
        ]
    )


register(
    Task("masks, Dice", _blobs, _masker, dice, (4, 16), (300, 200)),
    Task(
        "masks, focal",
        _blobs,
        _masker,
        keras.losses.BinaryFocalCrossentropy(),
        (4, 32),
        (300, 150),
        held_out=True,
    ),
    Task(
        "detection",
        _boxes,
        _detector,
        {"kind": "binary_crossentropy", "box": keras.losses.Huber()},
        (4, 32),
        (500, 300),
        {"loss_weights": {"kind": 1.0, "box": 10.0}},
    ),
    Task("denoising", _noisy_digits, _denoiser, "mse", (4, 32, 256), (400, 200, 100)),
    Task(
        "autoencoder",
        _digits_to_themselves,
        _autoencoder,
        "mse",
        (32, 256),
        (500, 300),
        held_out=True,
    ),
    Task(
        "variational autoencoder",
        _digits_to_themselves,
        _vae,
        "binary_crossentropy",
        (4, 64),
        (600, 300),
        floor=0.2,
    ),
    Task("upsampling", _upsampling_data, _upsampler, "mse", (32,), (200,), held_out=True),
)
