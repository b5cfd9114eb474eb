"""A small vision transformer, by KFC and by Adam.

Run `python examples/vision_transformer.py --help` for the options.
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

PATCH, WIDTH, HEADS, BLOCKS, BATCH = 2, 32, 4, 2, 64


# --8<-- [start:core]
class Positions(layers.Layer):
    """Adds a trained row to each position."""

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        """Makes the rows."""
        self.length = input_shape[1]
        # A layer within: it is instrumented, too, and gets a block.
        self.rows = layers.Embedding(self.length, input_shape[2])
        self.rows.build((1, self.length))

    def call(self, inputs: keras.KerasTensor) -> keras.KerasTensor:
        """Adds them."""
        return inputs + self.rows(keras.ops.arange(self.length)[None])


def net() -> keras.Model:
    """Patches as tokens, attention between them, the mean of what comes out."""
    inputs = keras.Input((8, 8, 1))
    patches = layers.Conv2D(WIDTH, PATCH, strides=PATCH)(inputs)
    tokens = Positions()(layers.Reshape((-1, WIDTH))(patches))
    for _ in range(BLOCKS):
        normal = layers.LayerNormalization()(tokens)
        tokens += layers.MultiHeadAttention(HEADS, WIDTH // HEADS)(normal, normal)
        normal = layers.LayerNormalization()(tokens)
        tokens += layers.Dense(WIDTH)(layers.Dense(4 * WIDTH, activation="gelu")(normal))
    mean = layers.GlobalAveragePooling1D()(layers.LayerNormalization()(tokens))
    return keras.Model(inputs, layers.Dense(10, activation="softmax")(mean))


def train(name: str, optimizer: keras.Optimizer, data: ImageData, epochs: int, seed: int) -> Run:
    """Trains; attention needs nothing of its own."""
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
    options = parse(__doc__, arguments, epochs=15, name="vision-transformer")
    data = load_digits()
    runs = [
        train(name, optimizer, data, options.epochs, options.seed)
        for name, optimizer in (
            ("KFC()", keras_kfc.KFC(seed=options.seed)),
            # The best of 0.001, 0.003 and 0.01 by held-out loss.
            ("Adam(0.01)", keras.optimizers.Adam(0.01)),
        )
    ]
    measures = {"loss": "training loss", "val_loss": "held-out loss", "val_accuracy": "accuracy"}
    show(runs, measures, "Handwritten digits, a vision transformer")
    picture = figure(10, 3.6)
    left, right = picture.subplots(1, 2)
    draw_curves(left, runs, "loss", "training loss")
    draw_curves(right, runs, "val_accuracy", "held-out accuracy", log=False)
    save(picture, options.picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
