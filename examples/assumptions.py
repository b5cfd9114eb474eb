"""Measures on a trained net how well the assumptions behind KFC hold.

Grosse & Martens (2016) assume that activations and derivatives are independent, that the
moments of both are the same at every position, and that derivatives at two positions are
uncorrelated. This example trains a small conv net, draws the spatial correlations and the
maps of moments of its convolutions, and tells how far `Ω ⊗ Γ` is from the exact Fisher
block, assumption by assumption: the relative error in the Frobenius norm, and the mean
cosine between the natural gradients of both (`fisher_blocks.natural_cosine`).

Run `python examples/assumptions.py --help` for the options.
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
from examples import fisher_blocks
from examples.data import DataError, load

ROOT = pathlib.Path(__file__).resolve().parent.parent
REACH = 3


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
    if options.quick:
        data = data.first(320)
    model = small_net(data.train_images.shape[1:], options.seed)
    keras_kfc.instrument(model)
    model.compile(keras_kfc.KFC(seed=options.seed), "sparse_categorical_crossentropy")
    images, labels = data.train_images[:10_000], data.train_labels[:10_000]
    model.fit(images, labels, epochs=options.epochs, batch_size=128, verbose=2)
    keras_kfc.strip(model)
    convolutions = [layer for layer in model.layers if isinstance(layer, layers.Conv2D)]
    chosen = data.test_images[: 100 if options.quick else 500]
    statistics = {
        layer.name: fisher_blocks.statistics_of(model, layer, chosen) for layer in convolutions
    }
    console = Console(width=120)
    for name, of_layer in statistics.items():
        console.print(errors_of(name, of_layer))
    path = options.output / f"assumptions-{options.dataset}{'-quick' * options.quick}.png"
    draw(statistics, path)
    console.print(f"Picture: {path}", soft_wrap=True)
    return 0


def small_net(shape: tuple[int, ...], seed: int) -> keras.Model:
    """Three small convolutions and a dense layer; activations stand apart."""
    keras.utils.set_random_seed(seed)
    stack: list[keras.Layer] = [keras.Input(shape)]
    if shape[0] > 8:
        stack.append(layers.AveragePooling2D(2))
    for filters in (6, 8, 8):
        stack += [layers.Conv2D(filters, 3, padding="same"), layers.ReLU()]
        if filters == 6:
            stack.append(layers.MaxPooling2D(2))
    return keras.Sequential([*stack, layers.Flatten(), layers.Dense(10), layers.Softmax()])


def errors_of(name: str, statistics: fisher_blocks.Statistics) -> Table:
    """A table of how far each approximation of a layer's Fisher block is from the exact one."""
    # As much as KFC takes.
    damping = float(keras_kfc.KFC().damping)
    block = fisher_blocks.exact_block(statistics)
    rows, columns = statistics.patches.shape[-1], statistics.derivatives.shape[-1]
    candidates = {
        "activations and derivatives independent": "independent",
        "and derivatives spatially uncorrelated": "uncorrelated",
        "and moments spatially homogeneous: Ω ⊗ Γ": "homogeneous",
    }
    found = fisher_blocks.approximations(statistics)
    matrices = {text: found[key] for text, key in candidates.items()}
    matrices["partial traces of the block"] = fisher_blocks.product_of_partial_traces(
        block, rows, columns
    )
    matrices["nearest Kronecker product there is"] = fisher_blocks.nearest_kronecker_product(
        block, rows, columns
    )
    matrices["diagonal of the block"] = np.diag(np.diag(block))
    matrices["multiple of the identity"] = np.trace(block) / len(block) * np.eye(len(block))
    table = Table(title=f"Fisher block of {name}, {len(block)} weights")
    table.add_column("approximation")
    table.add_column("relative error", justify="right")
    table.add_column(f"cosine at damping {damping:g}", justify="right")
    for text, matrix in matrices.items():
        table.add_row(
            text,
            f"{fisher_blocks.relative_error(matrix, block):.2f}",
            f"{fisher_blocks.natural_cosine(matrix, block, damping):.3f}",
        )
    return table


def draw(statistics: dict[str, fisher_blocks.Statistics], path: pathlib.Path) -> None:
    """Draws spatial correlations and maps of moments, one row for each convolution."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        len(statistics), 4, figsize=(13, 3.2 * len(statistics)), layout="constrained", squeeze=False
    )
    for row, (name, of_layer) in zip(axes, statistics.items(), strict=True):
        # The kernel's centre and no bias: the layer's input at each position.
        centre = of_layer.patches[:, :, :-1].reshape(*of_layer.patches.shape[:2], 9, -1)[:, :, 4]
        for axis, (values, title) in zip(
            row[:2], ((centre, "inputs"), (of_layer.weighted, "derivatives")), strict=True
        ):
            shown = fisher_blocks.correlations(values, of_layer.map_shape, REACH)
            extent = (-REACH - 0.5, REACH + 0.5, REACH + 0.5, -REACH - 0.5)
            image = axis.imshow(shown, cmap="RdBu_r", vmin=-1, vmax=1, extent=extent)
            axis.set_title(f"{title}: correlation", fontsize="medium")
            axis.set_xlabel("displacement")
            figure.colorbar(image, ax=axis)
        row[0].set_ylabel(name)
        for axis, (values, title) in zip(
            row[2:], ((centre, "inputs"), (of_layer.weighted, "derivatives")), strict=True
        ):
            shown = fisher_blocks.map_of_moments(values, of_layer.map_shape)
            image = axis.imshow(shown, cmap="viridis", vmin=0)
            axis.set_title(f"{title}: relative second moment", fontsize="medium")
            axis.set(xticks=[], yticks=[])
            figure.colorbar(image, ax=axis)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", choices=("digits", "fashion-mnist"), default="digits")
    parser.add_argument("--data-dir", help="folder of Fashion-MNIST's IDX files (download)")
    parser.add_argument("--epochs", type=int, default=5)
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
        options.epochs = 1
    return options


if __name__ == "__main__":
    sys.exit(main())
