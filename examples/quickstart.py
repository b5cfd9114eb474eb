"""Trains a small conv net on handwritten digits with KFC, and with tuned SGD and Adam.

Prints a table, draws the training loss, exports the net that KFC trained as a
SavedModel, loads it back and reads held-out digits with it.

Run `python examples/quickstart.py --help` for the options.
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
import tensorflow as tf
from rich.console import Console

import keras_kfc
from examples.comparison import Run, best, draw, table, train
from examples.data import DataError, ImageData, load
from examples.nets import digits_net, fashion_net

ROOT = pathlib.Path(__file__).resolve().parent.parent
# Learning rates that the baselines are tuned over; KFC runs at its defaults.
SGD_RATES = {"digits": (0.01, 0.03, 0.1, 0.3), "fashion-mnist": (0.003, 0.01, 0.03)}
ADAM_RATES = {"digits": (0.003, 0.01, 0.03), "fashion-mnist": (0.001, 0.003, 0.01)}


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
    runs = train_all(options, data)
    winner = runs[0]
    # What the better baseline ends with is the mark to beat.
    target = best(runs[1:]).final_loss
    # A short run does not overwrite what a real one left.
    name = f"{options.dataset}-quick" if options.quick else options.dataset
    console = Console(width=120)
    console.print(table(runs, target))
    picture = options.output / f"{name}.png"
    draw(runs, picture, f"{options.dataset}: {len(data.train_images):,} training images")
    console.print(f"Picture: {shown(picture)}", soft_wrap=True)
    export(winner, data, options.saved_models / name, console)
    return 0


def train_all(options: argparse.Namespace, data: ImageData) -> list[Run]:
    """Trains with KFC at its defaults, and with SGD and Adam at their best learning rates."""
    fashion = options.dataset == "fashion-mnist"
    rates = 1 if options.quick else None
    if options.quick:
        data = data.first(320)

    def race(optimizer, setting):
        heading = f"{type(optimizer).__name__}({setting})"
        print(f"\n{heading}", flush=True)
        return train(
            lambda: (fashion_net if fashion else digits_net)(options.seed),
            optimizer,
            setting,
            data,
            epochs=options.epochs,
            batch_size=256 if fashion else 64,
            every=25 if fashion else 5,
            seed=options.seed,
        )

    return [
        race(keras_kfc.KFC(seed=options.seed), ""),
        best(
            [
                race(keras.optimizers.SGD(rate, momentum=0.9), f"{rate}, momentum=0.9")
                for rate in SGD_RATES[options.dataset][:rates]
            ]
        ),
        best(
            [
                race(keras.optimizers.Adam(rate), f"{rate}")
                for rate in ADAM_RATES[options.dataset][:rates]
            ]
        ),
    ]


def export(run: Run, data: ImageData, folder: pathlib.Path, console: Console) -> None:
    """Exports a trained net, loads it back with TensorFlow alone and classifies with it."""
    keras_kfc.strip(run.model).export(str(folder), verbose=False)
    served = tf.saved_model.load(str(folder))
    probabilities = served.serve(tf.constant(data.test_images)).numpy()
    predicted = probabilities.argmax(axis=-1)
    accuracy = np.mean(predicted == data.test_labels)
    console.print(
        f"SavedModel: {shown(folder)}, reads {accuracy:.2%} of held-out images right",
        soft_wrap=True,
    )
    console.print(f"  it reads  {' '.join(map(str, predicted[:20]))}")
    console.print(f"  they are  {' '.join(map(str, data.test_labels[:20]))}")


def shown(path: pathlib.Path) -> pathlib.Path:
    """The path as short as it goes."""
    return path.relative_to(ROOT) if path.is_relative_to(ROOT) else path


def positive(text: str) -> int:
    """Reads a positive integer from the command line."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer, received {text!r}")
    return int(text)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", choices=("digits", "fashion-mnist"), default="digits")
    parser.add_argument(
        "--data-dir",
        help="folder of the four IDX .gz files of Fashion-MNIST (default: download them)",
    )
    parser.add_argument("--epochs", type=positive, help="default: 10, fashion-mnist 3")
    parser.add_argument("--seed", type=positive, default=1, help="of weights, batches and draws")
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
    options = parser.parse_args(arguments)
    if options.epochs is None:
        options.epochs = 1 if options.quick else 10 if options.dataset == "digits" else 3
    return options


if __name__ == "__main__":
    sys.exit(main())
