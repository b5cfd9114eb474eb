"""Transfer learning: a net that was trained without labels learns digits from five of each.

First a conv net learns how digits were turned, by a multiple of 90 degrees, for which nobody
needs labels. Then it gets a new head, and all of it is trained on five labelled images of each
digit: by KFC, by Adam, and by KFC from scratch, to see what the first training was worth.

Run `python examples/transfer_learning.py --help` for the options.
"""

import os
import pathlib
import sys

if not __package__:  # run as a script: let it find the modules beside it
    sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
from keras import layers

import keras_kfc
from examples.data import load_digits
from examples.gallery import Run, draw_curves, figure, parse, save, show, timed

OF_EACH = 5


# --8<-- [start:core]
def backbone() -> keras.Model:
    """What is carried over: convolutions with batch normalisation, as most backbones have."""
    stack: list[keras.Layer] = [keras.Input((8, 8, 1))]
    for filters, pool in ((16, layers.MaxPooling2D()), (32, layers.GlobalAveragePooling2D())):
        stack.append(layers.Conv2D(filters, 3, padding="same", use_bias=False))
        stack += [layers.BatchNormalization(momentum=0.9), layers.ReLU(), pool]
    return keras.Sequential(stack, name="backbone")


def with_head(body: keras.Model, classes: int) -> keras.Model:
    """A new head, on features of all that came before."""
    model = keras.Sequential([body, layers.Dense(classes, activation="softmax")])
    # Layers that have been instrumented before stay as they are.
    return keras_kfc.instrument(model)


def fine_tune(name: str, body: keras.Model, optimizer: keras.Optimizer, fit: dict) -> Run:
    """Trains all layers on little data."""
    model = with_head(body, classes=10)
    model.compile(optimizer, "sparse_categorical_crossentropy", metrics=["accuracy"])
    return timed(name, model, **fit)


# --8<-- [end:core]


def main(arguments: list[str] | None = None) -> int:
    """Runs the example.

    Args:
        arguments: Command line, by default that of the process.

    Returns:
        Exit status.
    """
    options = parse(__doc__, arguments, epochs=15, name="transfer-learning")
    data = load_digits()
    images, labels = data.train_images, data.train_labels
    turned = np.concatenate([np.rot90(images, turns, axes=(1, 2)) for turns in range(4)])
    keras.utils.set_random_seed(options.seed)
    known = backbone()
    teacher = with_head(known, classes=4)
    teacher.compile(keras_kfc.KFC(seed=options.seed), "sparse_categorical_crossentropy")
    teacher.fit(turned, np.repeat(np.arange(4), len(images)), batch_size=64, epochs=3, verbose=0)

    few = np.concatenate([np.flatnonzero(labels == digit)[:OF_EACH] for digit in range(10)])
    fit = {
        "x": images[few],
        "y": labels[few],
        "batch_size": 10,
        "epochs": options.epochs,
        "validation_data": (data.test_images, data.test_labels),
    }
    learned = known.get_weights()
    runs = []
    for name, optimizer, weights in (
        # Decay would draw the weights away from what they know.
        ("KFC(weight_decay=None)", keras_kfc.KFC(weight_decay=None, seed=options.seed), learned),
        # The best of 0.003, 0.01, 0.03 and 0.1 by held-out loss.
        ("Adam(0.03)", keras.optimizers.Adam(0.03), learned),
        ("KFC(), from scratch", keras_kfc.KFC(seed=options.seed), None),
    ):
        keras.utils.set_random_seed(options.seed)
        body = backbone()
        if weights is not None:
            body.set_weights(weights)
        runs.append(fine_tune(name, body, optimizer, fit))
    measures = {"loss": "training loss", "val_loss": "held-out loss", "val_accuracy": "accuracy"}
    show(runs, measures, f"Handwritten digits, {OF_EACH} images of each")
    picture = figure(10, 3.6)
    left, right = picture.subplots(1, 2)
    draw_curves(left, runs, "val_loss", "held-out loss")
    draw_curves(right, runs, "val_accuracy", "held-out accuracy", log=False)
    save(picture, options.picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
