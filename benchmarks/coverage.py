"""How much of well-known networks has a block of the curvature.

`python -m benchmarks.coverage` builds one network of every family in `keras.applications`, those of
`benchmarks.family_nets`, a GRU, an autoencoder and the discriminator of a DCGAN. It prints for each
the share of its parameters with a block and what the optimizer takes beside them; with `--steps`,
also the seconds of the first step and the milliseconds of the others, for KFC() and Adam.
"""

import argparse
import functools
import os
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
from keras import layers
from rich.console import Console
from rich.table import Table

import keras_kfc
from benchmarks.deep import NETS
from benchmarks.family_nets import FAMILIES
from keras_kfc.layers.groups import parameter_groups

# The smallest of each family.
APPLICATIONS = (
    "ConvNeXtTiny",
    "DenseNet121",
    "EfficientNetB0",
    "EfficientNetV2B0",
    "InceptionV3",
    "InceptionResNetV2",
    "MobileNet",
    "MobileNetV2",
    "MobileNetV3Small",
    "NASNetMobile",
    "ResNet50",
    "ResNet50V2",
    "VGG16",
    "Xception",
)


def _gated() -> keras.Model:
    """A net of two GRUs, one of them in both directions, on rows of images."""
    recurrent = layers.Bidirectional(layers.GRU(64, return_sequences=True))
    return keras.Sequential(
        [keras.Input((28, 28)), recurrent, layers.GRU(64), layers.Dense(10, "softmax")]
    )


def share_with_block(model: keras.Model) -> float:
    """Part of the trainable parameters of an instrumented model that belong to a block."""
    variables = model.trainable_variables
    sizes = [int(np.prod(variable.shape)) for variable in variables]
    covered = {index for group in parameter_groups(variables) for index in group.indices.every}
    return sum(sizes[index] for index in covered) / sum(sizes)


def _step_times(
    model: keras.Model, optimizer: Any, inputs: Any, targets: Any
) -> tuple[float, float]:
    """Seconds of the first step, and milliseconds of the median of five others."""
    model.compile(optimizer, "sparse_categorical_crossentropy", jit_compile=False)
    times = []
    for _ in range(6):
        begin = time.perf_counter()
        model.train_on_batch(inputs, targets)
        times.append(time.perf_counter() - begin)
    return times[0], 1000 * float(np.median(times[1:]))


def main() -> None:
    """Builds the networks and prints the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.coverage", description=__doc__)
    parser.add_argument("--only", nargs="*", default=[], help="names of networks")
    parser.add_argument("--steps", action="store_true", help="take steps, too, with 8 examples")
    arguments = parser.parse_args()
    builders: dict[str, Callable[[], keras.Model]] = {
        name: functools.partial(getattr(keras.applications, name), weights=None)
        for name in APPLICATIONS
    }
    builders |= {name: build for name, (build, _) in FAMILIES.items()}
    builders |= {name: NETS[name][0] for name in ("autoencoder", "discriminator")}
    builders["gru"] = _gated
    table = Table(title="Parameters with a block, and what KFC() takes beside the weights")
    headings = ["network", "parameters", "with a block", "blocks", "memory, of Adam's"]
    if arguments.steps:
        headings += ["first step, s", "Adam", "step, of Adam's"]
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "network" else "right")
    for name, build in builders.items():
        if arguments.only and name not in arguments.only:
            continue
        keras.backend.clear_session()
        model = keras_kfc.instrument(build())
        variables = model.trainable_variables
        parameters = sum(int(np.prod(variable.shape)) for variable in variables)
        usage = keras_kfc.KFC().memory_usage(variables)
        row = [
            name,
            f"{parameters:,}",
            f"{share_with_block(model):.2%}",
            str(len(list(parameter_groups(variables)))),
            f"{usage.total / (8 * parameters):.2f}",
        ]
        if arguments.steps:
            row += _steps(build)
        print(*row, flush=True)
        table.add_row(*row)
    Console(width=120).print(table)


def _steps(build: Callable[[], keras.Model]) -> list[str]:
    times = []
    for kfc in (True, False):
        keras.backend.clear_session()
        model = build()
        shape = [size or 64 for size in model.inputs[0].shape[1:]]
        rng = np.random.default_rng(0)
        whole = model.inputs[0].dtype.startswith("int")
        numbers = rng.integers(0, 90, (8, *shape)) if whole else rng.normal(size=(8, *shape))
        targets = np.zeros((8, *model.outputs[0].shape[1:-1]), "int32")
        if kfc:
            keras_kfc.instrument(model)
        optimizer = keras_kfc.KFC() if kfc else keras.optimizers.Adam()
        times.append(_step_times(model, optimizer, numbers, targets))
    (first, step), (adam_first, adam_step) = times
    return [f"{first:.1f}", f"{adam_first:.1f}", f"{step / adam_step:.2f}"]


if __name__ == "__main__":
    main()
