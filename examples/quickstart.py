"""Trains a deep autoencoder on handwritten digits with KFC, and with tuned Adam and SGD.

Prints a table, draws the training loss, exports the net that KFC trained as a
SavedModel, loads it back and runs held-out digits through it. With `--dataset
fashion-mnist` it is a conv net that classifies images of clothes.

Run `python examples/quickstart.py --help` for the options.
"""

import argparse
import dataclasses
import os
import pathlib
import sys

if not __package__:  # run as a script: let it find the modules beside it
    sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import tensorflow as tf
from rich.console import Console

import keras_kfc
from examples.comparison import Run, Task, best, draw, table, train
from examples.data import DataError, ImageData, load
from examples.gallery import positive
from examples.nets import digits_autoencoder, fashion_net

ROOT = pathlib.Path(__file__).resolve().parent.parent
# Learning rates that `--tune` chooses from, and those that it found; KFC runs at its defaults.
RATES = {
    "digits": {"Adam": (0.001, 0.002, 0.003, 0.005, 0.01), "SGD": (0.3, 1.0, 2.0, 3.0, 5.0)},
    "fashion-mnist": {
        "Adam": (0.0005, 0.001, 0.002, 0.005, 0.01),
        "SGD": (0.005, 0.01, 0.02, 0.05, 0.1),
    },
}
TUNED = {"digits": {"Adam": 0.005, "SGD": 3.0}, "fashion-mnist": {"Adam": 0.002, "SGD": 0.02}}


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
    task = (autoencoder if options.dataset == "digits" else classifier)(data)
    task = dataclasses.replace(task, epochs=options.epochs or task.epochs)
    if options.quick:
        inputs, targets = task.train
        task = dataclasses.replace(task, epochs=1, train=(inputs[:320], targets[:320]))
    runs = train_all(task, options)
    # A short run does not overwrite what a real one left.
    name = f"{options.dataset}-quick" if options.quick else options.dataset
    console = Console(width=120)
    console.print(table(runs, task))
    picture = options.output / f"{name}.png"
    draw(runs, picture, task.title)
    console.print(f"Picture: {shown(picture)}", soft_wrap=True)
    export(runs[0], task, options.saved_models / name, console)
    return 0


def autoencoder(data: ImageData) -> Task:
    """Digits through six numbers and back."""
    low, high = data.train_images.min(), data.train_images.max()
    train, test = (
        (images.reshape(len(images), -1) - low) / (high - low)
        for images in (data.train_images, data.test_images)
    )
    title = f"Deep autoencoder, {len(train):,} handwritten digits of 8x8 pixels"
    return Task(
        title,
        digits_autoencoder,
        "mean_squared_error",
        (train, train),
        (test, test),
        target=0.008,
        batch_size=150,
        epochs=300,
        counts=False,
        measured=500,
    )


def classifier(data: ImageData) -> Task:
    """Images of clothes into ten classes."""
    return Task(
        f"Conv net, {len(data.train_images):,} images of Fashion-MNIST",
        fashion_net,
        "sparse_categorical_crossentropy",
        (data.train_images, data.train_labels),
        (data.test_images, data.test_labels),
        target=0.25,
        batch_size=256,
        epochs=3,
        counts=True,
    )


def train_all(task: Task, options: argparse.Namespace) -> list[Run]:
    """Trains with KFC at its defaults, and with Adam and SGD at the learning rates found best."""
    seed = options.seed
    runs = [train(task, keras_kfc.KFC(seed=seed), "KFC()", seed)]
    for kind, arguments in (("Adam", {}), ("SGD", {"momentum": 0.9})):
        known = (TUNED[options.dataset][kind],)
        settings = [
            (rate, ", ".join([f"{rate}", *(f"{key}={value}" for key, value in arguments.items())]))
            for rate in (RATES[options.dataset][kind] if options.tune else known)
        ]
        optimizer = getattr(keras.optimizers, kind)
        runs.append(
            best(
                [
                    train(task, optimizer(rate, **arguments), f"{kind}({text})", seed)
                    for rate, text in settings
                ]
            )
        )
    return runs


def export(run: Run, task: Task, folder: pathlib.Path, console: Console) -> None:
    """Exports a trained net, loads it back with TensorFlow alone and runs held-out data through."""
    keras_kfc.strip(run.model).export(str(folder), verbose=False)
    served = tf.saved_model.load(str(folder))
    inputs, targets = task.test
    outputs = served.serve(tf.constant(inputs)).numpy()
    loss = float(tf.reduce_mean(keras.losses.get(task.loss)(targets, outputs)))
    console.print(
        f"SavedModel: {shown(folder)}, loaded again: held-out loss {loss:.3g}", soft_wrap=True
    )
    if task.counts:
        console.print(f"  it reads  {' '.join(map(str, outputs.argmax(axis=-1)[:20]))}")
        console.print(f"  they are  {' '.join(map(str, targets[:20]))}")


def shown(path: pathlib.Path) -> pathlib.Path:
    """The path as short as it goes."""
    return path.relative_to(ROOT) if path.is_relative_to(ROOT) else path


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", choices=("digits", "fashion-mnist"), default="digits")
    parser.add_argument(
        "--data-dir",
        help="folder of the four IDX .gz files of Fashion-MNIST (default: download them)",
    )
    parser.add_argument(
        "--epochs", type=positive, help="the most for each run (default: 300, fashion-mnist 3)"
    )
    parser.add_argument("--seed", type=positive, default=1, help="of weights, batches and draws")
    parser.add_argument(
        "--tune", action="store_true", help="try five learning rates for Adam and SGD each"
    )
    parser.add_argument("--quick", action="store_true", help="a short run that shows nothing")
    parser.add_argument(
        "--output",
        type=pathlib.Path,
        default=ROOT / "examples" / "output",
        help="folder for the picture (default: examples/output)",
    )
    parser.add_argument(
        "--saved-models",
        type=pathlib.Path,
        default=ROOT / "saved_models",
        help="folder for the exported net (default: saved_models)",
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
