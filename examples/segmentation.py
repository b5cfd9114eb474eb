"""A U-Net that finds the pixels of digits on photographs, by KFC and by Adam.

Backgrounds are pieces of the two photographs that scikit-learn ships.

Run `python examples/segmentation.py --help` for the options.
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
from examples.gallery import Run, draw_curves, figure, parse, save, show, timed

SIZE, BATCH = 32, 32


# --8<-- [start:core]
def double(tensor: keras.KerasTensor, filters: int) -> keras.KerasTensor:
    """Two convolutions."""
    for _ in range(2):
        tensor = layers.Conv2D(filters, 3, padding="same", activation="relu")(tensor)
    return tensor


def unet(filters: int = 8) -> keras.Model:
    """Down by two steps and up again, beside what was there on the way down."""
    inputs = keras.Input((SIZE, SIZE, 3))
    first = double(inputs, filters)
    second = double(layers.MaxPooling2D()(first), 2 * filters)
    tensor = double(layers.MaxPooling2D()(second), 4 * filters)
    for beside, width in ((second, 2 * filters), (first, filters)):
        tensor = layers.Conv2DTranspose(width, 2, strides=2)(tensor)
        tensor = double(layers.Concatenate()([tensor, beside]), width)
    return keras.Model(inputs, layers.Conv2D(1, 1, activation="sigmoid")(tensor))


def train(name: str, optimizer: keras.Optimizer, data: dict, epochs: int, seed: int) -> Run:
    """Trains on masks, one class against the background."""
    keras.utils.set_random_seed(seed)
    model = keras_kfc.instrument(unet())
    overlap = keras.metrics.BinaryIoU([1], threshold=0.5, name="overlap")
    model.compile(optimizer, "binary_crossentropy", metrics=[overlap])
    return timed(name, model, batch_size=BATCH, epochs=epochs, **data)


# --8<-- [end:core]


def scenes(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Digits on photographs, `(N, 32, 32, 3)` in [0, 1], and their masks, `(N, 32, 32, 1)`."""
    from sklearn.datasets import load_digits, load_sample_images

    rng = np.random.default_rng(seed)
    photographs = load_sample_images().images
    digits = load_digits().images[rng.permutation(1797)[:count]]
    images = np.empty((count, SIZE, SIZE, 3), "float32")
    masks = np.zeros((count, SIZE, SIZE, 1), "float32")
    for image, mask, digit in zip(images, masks, digits, strict=True):
        photograph = photographs[rng.integers(len(photographs))]
        y, x = (rng.integers(length - SIZE) for length in photograph.shape[:2])
        image[:] = photograph[y : y + SIZE, x : x + SIZE] / 255
        large = digit.repeat(3, axis=0).repeat(3, axis=1)[..., None] / 16
        y, x = rng.integers(SIZE - len(large), size=2)
        place = slice(y, y + len(large)), slice(x, x + len(large))
        image[place] += 0.5 * large * (rng.uniform(0, 1, 3) - image[place])
        mask[place] = large > 0.4
    return images, masks


def main(arguments: list[str] | None = None) -> int:
    """Runs the example.

    Args:
        arguments: Command line, by default that of the process.

    Returns:
        Exit status.
    """
    options = parse(__doc__, arguments, epochs=15, name="segmentation")
    count = 64 if options.quick else 500
    images, masks = scenes(count + 200, seed=0)
    data = {
        "x": images[:count],
        "y": masks[:count],
        "validation_data": (images[count:], masks[count:]),
    }
    runs = [
        train(name, optimizer, data, options.epochs, options.seed)
        for name, optimizer in (
            ("KFC()", keras_kfc.KFC(seed=options.seed)),
            # The best of 0.003, 0.01 and 0.03 by held-out loss.
            ("Adam(0.003)", keras.optimizers.Adam(0.003)),
        )
    ]
    measures = {"loss": "training loss", "val_loss": "held-out loss", "val_overlap": "overlap"}
    show(runs, measures, f"Digits on photographs, {count} images")
    draw(runs, images[count:], masks[count:], options.picture)
    return 0


def draw(runs: list[Run], images: np.ndarray, masks: np.ndarray, path: pathlib.Path) -> None:
    """Draws what KFC's net finds in four images that it has not seen, beside the curves."""
    picture = figure(11, 4)
    left, right = picture.subfigures(1, 2)
    found = runs[0].model.predict(images[:4], verbose=0)
    rows = (("image", images), ("digit", masks[..., 0]), ("found", found[..., 0]))
    for axes, (label, row) in zip(left.subplots(3, 4), rows, strict=True):
        for axis, image in zip(axes, row[:4], strict=True):
            axis.imshow(image, vmin=0, vmax=1, cmap="gray")
            axis.set(xticks=[], yticks=[])
        axes[0].set_ylabel(label)
    draw_curves(right.subplots(), runs, "val_loss", "held-out loss")
    save(picture, path)


if __name__ == "__main__":
    sys.exit(main())
