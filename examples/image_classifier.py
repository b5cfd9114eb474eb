"""An image classifier with augmentation, dropout and a schedule, by KFC and by Adam.

Run `python examples/image_classifier.py --help` for the options.
"""

import os
import pathlib
import sys

if not __package__:  # run as a script: let it find the modules beside it
    sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
from keras import layers

import keras_kfc
from examples.data import ImageData, load_digits
from examples.gallery import Run, draw_curves, figure, parse, save, show, timed

BATCH = 64


# --8<-- [start:core]
def net() -> keras.Model:
    """Three convolutions; images are moved about in training."""
    return keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            layers.RandomTranslation(0.1, 0.1, fill_mode="nearest"),
            layers.Conv2D(32, 3, padding="same", activation="relu"),
            layers.Conv2D(32, 3, padding="same", activation="relu"),
            layers.MaxPooling2D(),
            layers.Conv2D(64, 3, padding="same", activation="relu"),
            layers.Flatten(),
            layers.Dropout(0.3),
            layers.Dense(10, activation="softmax"),
        ]
    )


def decay(rate: float, data: ImageData, epochs: int) -> keras.optimizers.schedules.CosineDecay:
    """A schedule to zero over the whole training."""
    return keras.optimizers.schedules.CosineDecay(
        rate, epochs * -(-len(data.train_images) // BATCH)
    )


def train(name: str, optimizer: keras.Optimizer, data: ImageData, epochs: int, seed: int) -> Run:
    """Trains; only the optimizer differs from a script with Adam."""
    keras.utils.set_random_seed(seed)
    model = keras_kfc.instrument(net())
    model.compile(optimizer, "sparse_categorical_crossentropy", metrics=["accuracy"])
    return timed(
        name,
        model,
        x=data.train_images,
        y=data.train_labels,
        batch_size=BATCH,
        epochs=epochs,
        validation_data=(data.test_images, data.test_labels),
    )


# --8<-- [end:core]


def main(arguments: list[str] | None = None) -> int:
    """Runs the example.

    Args:
        arguments: Command line, by default that of the process.

    Returns:
        Exit status.
    """
    options = parse(__doc__, arguments, epochs=12, name="image-classifier")
    data = load_digits()
    kfc_decay, adam_decay = (decay(rate, data, options.epochs) for rate in (0.03, 0.01))
    runs = [
        train(name, optimizer, data, options.epochs, options.seed)
        for name, optimizer in (
            ("KFC()", keras_kfc.KFC(kfc_decay, seed=options.seed)),
            # The best of 0.003, 0.01 and 0.03 by held-out loss.
            ("Adam(0.01)", keras.optimizers.Adam(adam_decay)),
        )
    ]
    measures = {"loss": "training loss", "val_loss": "held-out loss", "val_accuracy": "accuracy"}
    show(runs, measures, "Handwritten digits")
    picture = figure(10, 3.6)
    left, right = picture.subplots(1, 2)
    draw_curves(left, runs, "loss", "training loss, with dropout")
    draw_curves(right, runs, "val_loss", "held-out loss")
    save(picture, options.picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
