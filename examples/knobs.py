"""What the three knobs of KFC do: one picture each for learning rate, damping and Polyak scaling.

A conv net is trained with several values of one setting, all others at their defaults, from the
same weights on the same batches. Each picture shows the training loss, averaged over some
steps, and the length of the steps.

Run `python examples/knobs.py --help` for the options.
"""

import argparse
import os
import pathlib
import sys
from typing import Any

if not __package__:  # run as a script: let it find the modules beside it
    sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np

import keras_kfc
from examples.data import DataError, ImageData, load
from examples.gallery import OUTPUT, figure, logarithmic, positive, save
from examples.nets import digits_net, fashion_net

BATCH = 64
# The default of each is among them.
VALUES = {
    "learning_rate": (0.001, 0.01, 0.03, 0.3),
    "damping": (0.001, 0.15, 1.0, 10.0),
    "polyak_scaling": (0.2, 1.0, 3.0, 10.0),
}
# Steps that a curve's averages go over.
SMOOTHING = 20


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
    build = digits_net if options.dataset == "digits" else fashion_net
    for knob in options.knobs:
        curves = {
            value: train(build(options.seed), knob, value, data, options)
            for value in VALUES[knob][: 1 if options.quick else None]
        }
        name = f"knob-{knob.replace('_', '-')}{'-quick' * options.quick}"
        draw(knob, curves, options.output / f"{name}.png")
    return 0


def train(
    model: keras.Model, knob: str, value: float, data: ImageData, options: argparse.Namespace
) -> dict[str, np.ndarray]:
    """Loss and length of each step of a training with one value of a knob."""
    keras_kfc.instrument(model)
    settings: dict[str, Any] = {knob: value}
    optimizer = keras_kfc.KFC(seed=options.seed, **settings)
    model.compile(optimizer, "sparse_categorical_crossentropy")
    rng = np.random.default_rng(options.seed)
    losses, lengths = [], []
    before = np.concatenate([weight.ravel() for weight in model.get_weights()])
    for _ in range(options.steps):
        chosen = rng.integers(len(data.train_images), size=BATCH)
        losses.append(model.train_on_batch(data.train_images[chosen], data.train_labels[chosen]))
        after = np.concatenate([weight.ravel() for weight in model.get_weights()])
        lengths.append(np.sqrt(np.mean(np.square(after - before))))
        before = after
    print(f"{knob}={value}: loss {np.mean(losses[-SMOOTHING:]):.3g}")
    return {"loss": np.array(losses), "length": np.array(lengths)}


def draw(knob: str, curves: dict[float, dict[str, np.ndarray]], path: pathlib.Path) -> None:
    """Draws the loss and the length of steps for each value."""
    picture = figure(10, 3.8)
    left, right = picture.subplots(1, 2)
    default = float(getattr(keras_kfc.KFC(), knob))
    for value, curve in curves.items():
        label = f"{value:g}" + (", the default" if np.isclose(value, default) else "")
        for axes, name in ((left, "loss"), (right, "length")):
            window = min(SMOOTHING, len(curve[name]))
            smooth = np.convolve(curve[name], np.ones(window) / window, "valid")
            axes.plot(np.arange(len(smooth)) + window, smooth, label=label)
    left.set(xlabel="step", ylabel="training loss")
    right.set(xlabel="step", ylabel="change of a weight, root mean square")
    for axes in (left, right):
        logarithmic(axes)
        axes.grid(True, alpha=0.3)
    left.legend(title=knob, fontsize="small")
    save(picture, path)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", choices=("digits", "fashion-mnist"), default="digits")
    parser.add_argument("--data-dir", help="folder of Fashion-MNIST's IDX files (download)")
    parser.add_argument("--knobs", nargs="+", choices=VALUES, default=list(VALUES))
    parser.add_argument("--steps", type=positive, default=500)
    parser.add_argument("--seed", type=int, default=1, help="of weights, batches and draws")
    parser.add_argument("--quick", action="store_true", help="a short run that shows nothing")
    parser.add_argument(
        "--output",
        type=pathlib.Path,
        default=OUTPUT,
        help="folder for the pictures (default: examples/output)",
    )
    options = parser.parse_args(arguments)
    if options.quick:
        options.steps, options.knobs = 3, ["damping"]
    return options


if __name__ == "__main__":
    sys.exit(main())
