"""How sure is a trained net? A Laplace posterior around it, and what that does to predictions.

A small conv net is trained with KFC until it is too sure of itself. Then
`keras_kfc.laplace` makes a posterior over its weights from the same Kronecker factors, over all
layers and over the last alone, with the prior that explains the data best. For each the example
prints, on held-out images, accuracy, log likelihood and the expected calibration error, and how
well confidence tells other images from those (digits from clothes, noise from digits). The picture
shows how often predictions of a confidence are right, and how sure the net is of other images.

Run `python examples/uncertainty.py --help` for the options.
"""

import argparse
import os
import pathlib
import sys

if not __package__:  # run as a script: let it find the modules beside it
    sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
from keras import layers
from rich.console import Console
from rich.table import Table

import keras_kfc
from examples.data import DataError, ImageData, load, load_digits

ROOT = pathlib.Path(__file__).resolve().parent.parent
BINS = 10


def main(arguments: list[str] | None = None) -> int:
    """Runs the example.

    Args:
        arguments: Command line, by default that of the process.

    Returns:
        Exit status.
    """
    options = parse(arguments)
    try:
        data = load(options.dataset, options.data_dir)
    except DataError as error:
        print(error, file=sys.stderr)
        return 1
    count = 200 if options.quick else options.examples
    data = data.first(count)
    images, labels = data.test_images[: 2 * count], data.test_labels[: 2 * count]
    others = other_images(data, options.dataset, len(images), options.seed)
    model = keras_kfc.instrument(net(images.shape[1:], options.seed))
    model.compile(keras_kfc.KFC(seed=options.seed), "sparse_categorical_crossentropy")
    model.fit(data.train_images, data.train_labels, epochs=options.epochs, batch_size=64, verbose=0)
    predictions = {
        "point estimate": (model.predict(images, verbose=0), model.predict(others, verbose=0))
    }
    for layers_ in ("last", "all"):
        posterior = keras_kfc.laplace(
            model, data.train_images, data.train_labels, layers=layers_, seed=options.seed
        )
        name = f"posterior, {layers_} layer{'s' * (layers_ == 'all')}"
        predictions[name] = (posterior.predict(images), posterior.predict(others))
    console = Console(width=110)
    console.print(table_of(predictions, labels))
    path = options.output / f"uncertainty-{options.dataset}{'-quick' * options.quick}.png"
    draw(predictions, labels, path)
    console.print(f"Picture: {path}", soft_wrap=True)
    return 0


def net(shape: tuple[int, ...], seed: int) -> keras.Model:
    """Two convolutions and two dense layers, without anything against overfitting."""
    keras.utils.set_random_seed(seed)
    stack: list[keras.Layer] = [keras.Input(shape)]
    if shape[0] > 8:
        stack.append(layers.AveragePooling2D(2))
    stack += [layers.Conv2D(8, 3, activation="relu"), layers.MaxPooling2D(2)]
    stack += [layers.Conv2D(16, 3, padding="same", activation="relu"), layers.Flatten()]
    stack += [layers.Dense(32, activation="relu"), layers.Dense(10, activation="softmax")]
    return keras.Sequential(stack)


def other_images(data: ImageData, dataset: str, count: int, seed: int) -> np.ndarray:
    """Images of nothing that the net was trained on, of the same size and scale."""
    shape = data.test_images.shape[1:]
    if dataset == "digits":
        rng = np.random.default_rng(seed)
        noise = rng.normal(size=(count, *shape)).astype("float32")
        return noise * data.train_images.std() + data.train_images.mean()
    digits = load_digits().train_images[:count]
    digits = (digits - digits.mean()) / digits.std()
    large = keras.ops.image.resize(digits, shape[:2]).numpy()
    return large * data.train_images.std() + data.train_images.mean()


def calibration_error(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Expected calibration error: mean distance of confidence from accuracy, over ten bins."""
    confidence, right = probabilities.max(1), probabilities.argmax(1) == labels
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
    return float(
        sum(
            abs(right[bins == b].mean() - confidence[bins == b].mean()) * np.mean(bins == b)
            for b in range(BINS)
            if np.any(bins == b)
        )
    )


def told_apart(inside: np.ndarray, outside: np.ndarray) -> float:
    """How often the net is surer of an image that it was trained for than of another one."""
    sure, unsure = inside.max(1), outside.max(1)
    ranks = np.argsort(np.argsort(np.concatenate([unsure, sure])))[len(unsure) :]
    return float((ranks.sum() - len(sure) * (len(sure) - 1) / 2) / (len(sure) * len(unsure)))


def table_of(predictions: dict[str, tuple[np.ndarray, np.ndarray]], labels: np.ndarray) -> Table:
    """What each kind of prediction is worth."""
    table = Table(title="Held-out images")
    table.add_column("prediction")
    for column in ("accuracy", "log likelihood", "calibration error", "told from others"):
        table.add_column(column, justify="right")
    for name, (inside, outside) in predictions.items():
        likelihood = np.log(np.maximum(inside[np.arange(len(labels)), labels], 1e-12)).mean()
        table.add_row(
            name,
            f"{np.mean(inside.argmax(1) == labels):.3f}",
            f"{likelihood:.3f}",
            f"{calibration_error(inside, labels):.3f}",
            f"{told_apart(inside, outside):.3f}",
        )
    return table


def draw(
    predictions: dict[str, tuple[np.ndarray, np.ndarray]], labels: np.ndarray, path: pathlib.Path
) -> None:
    """Draws accuracy by confidence, and the confidence in images of something else."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    left.plot([0, 1], [0, 1], color="0.7", linewidth=1, label="as sure as right")
    edges = np.linspace(0, 1, BINS + 1)
    for name, (inside, outside) in predictions.items():
        confidence, is_right = inside.max(1), inside.argmax(1) == labels
        bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
        filled = [b for b in range(BINS) if np.sum(bins == b) >= 5]
        left.plot(
            [confidence[bins == b].mean() for b in filled],
            [is_right[bins == b].mean() for b in filled],
            marker="o",
            label=name,
        )
        right.hist(outside.max(1), bins=edges, histtype="step", linewidth=1.8, label=name)
    left.set(xlabel="confidence", ylabel="part that is right", title="held-out images")
    right.set(xlabel="confidence", ylabel="images", title="images of something else")
    left.legend(fontsize="small")
    right.legend(fontsize="small", loc="upper center")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", choices=("digits", "fashion-mnist"), default="digits")
    parser.add_argument("--data-dir", help="folder of Fashion-MNIST's IDX files (download)")
    parser.add_argument("--examples", type=int, default=2000, help="images to train on, at most")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seed", type=int, default=1, help="of weights, batches and draws")
    parser.add_argument("--quick", action="store_true", help="a short run that shows nothing")
    parser.add_argument(
        "--output",
        type=pathlib.Path,
        default=ROOT / "examples" / "output",
        help="folder for the picture (default: examples/output)",
    )
    options = parser.parse_args(arguments)
    if options.quick:
        options.epochs = 2
    return options


if __name__ == "__main__":
    sys.exit(main())
