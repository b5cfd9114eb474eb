"""A variational autoencoder of digits, by KFC and by Adam.

Run `python examples/variational_autoencoder.py --help` for the options.
"""

import os
import pathlib
import sys

if not __package__:  # run as a script: let it find the modules beside it
    sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
from keras import layers, ops

import keras_kfc
from examples.data import load_digits
from examples.gallery import Run, draw_curves, figure, parse, save, show, timed

CODE, BATCH = 2, 64


# --8<-- [start:core]
class Draw(layers.Layer):
    """Draws a code from mean and log variance, and adds its divergence to the loss."""

    def __init__(self, weight: float, **kwargs: object):
        super().__init__(**kwargs)
        self.weight = weight
        self.seeds = keras.random.SeedGenerator(0)

    def call(self, inputs: keras.KerasTensor) -> keras.KerasTensor:
        """Draws."""
        mean, log_variance = ops.split(inputs, 2, axis=-1)
        divergence = ops.exp(log_variance) + ops.square(mean) - 1 - log_variance
        self.add_loss(self.weight * ops.mean(ops.sum(divergence, axis=-1)) / 2)
        noise = keras.random.normal(ops.shape(mean), seed=self.seeds)
        return mean + ops.exp(log_variance / 2) * noise


def autoencoder() -> tuple[keras.Model, keras.Model]:
    """The whole model, and its decoder."""
    decoder = keras.Sequential(
        [
            keras.Input((CODE,)),
            layers.Dense(64, activation="tanh"),
            layers.Dense(128, activation="tanh"),
            layers.Dense(64, activation="sigmoid"),
        ],
        name="decoder",
    )
    inputs = keras.Input((64,))
    tensor = layers.Dense(128, activation="tanh")(inputs)
    tensor = layers.Dense(64, activation="tanh")(tensor)
    # Keras's loss is a mean over 64 pixels, and so is the divergence.
    code = Draw(weight=1 / 64)(layers.Dense(2 * CODE)(tensor))
    return keras.Model(inputs, decoder(code)), decoder


def train(name: str, optimizer: keras.Optimizer, data: dict, epochs: int, seed: int) -> Run:
    """Trains on the compiled loss and what layers have added."""
    keras.utils.set_random_seed(seed)
    model, decoder = autoencoder()
    keras_kfc.instrument(model)
    model.compile(optimizer, "binary_crossentropy")
    run = timed(name, model, batch_size=BATCH, epochs=epochs, **data)
    run.model = decoder
    return run


# --8<-- [end:core]


def main(arguments: list[str] | None = None) -> int:
    """Runs the example.

    Args:
        arguments: Command line, by default that of the process.

    Returns:
        Exit status.
    """
    options = parse(__doc__, arguments, epochs=30, name="variational-autoencoder")
    digits = load_digits()
    low, high = digits.train_images.min(), digits.train_images.max()
    train_x, test_x = (
        (images.reshape(len(images), -1) - low) / (high - low)
        for images in (digits.train_images, digits.test_images)
    )
    data = {"x": train_x, "y": train_x, "validation_data": (test_x, test_x)}
    runs = [
        train(name, optimizer, data, options.epochs, options.seed)
        for name, optimizer in (
            ("KFC()", keras_kfc.KFC(seed=options.seed)),
            # The best of 0.003, 0.01 and 0.03 by held-out loss.
            ("Adam(0.003)", keras.optimizers.Adam(0.003)),
        )
    ]
    show(runs, {"loss": "training loss", "val_loss": "held-out loss"}, "Digits through two numbers")
    draw(runs, options.picture)
    return 0


def draw(runs: list[Run], path: pathlib.Path) -> None:
    """Draws digits from a grid of codes by KFC's decoder, beside the curves."""
    picture = figure(10, 4.2)
    left, right = picture.subplots(1, 2)
    grid = np.linspace(-2, 2, 11)
    codes = np.stack(np.meshgrid(grid, grid), axis=-1).reshape(-1, CODE)
    images = runs[0].model.predict(codes, verbose=0).reshape(11, 11, 8, 8)
    left.imshow(images.transpose(0, 2, 1, 3).reshape(88, 88), cmap="gray_r", extent=(-2, 2, 2, -2))
    left.set(xlabel="first number", ylabel="second number", title="digits of KFC's decoder")
    draw_curves(right, runs, "val_loss", "held-out loss", log=False)
    save(picture, path)


if __name__ == "__main__":
    sys.exit(main())
