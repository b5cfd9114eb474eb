"""Training steps of deep and of wide networks: KFC() against Adam and SGD with momentum.

`python -m benchmarks.deep` prints for each network: seconds of the first step and peak memory, of
a fresh process each; and, with the optimizers in turns in one process, how the steps after it
compare. KFC's early steps, where factors and inverses are renewed more often, have a column of
their own. `--operations` counts the nodes of the step's graph and its functions.
"""

import argparse
import functools
import gc
import json
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf
from keras import layers

import keras_kfc
from benchmarks.family_nets import FAMILIES
from benchmarks.harness import in_child_process, memory_of_process, report
from benchmarks.runs import optimizer_of

OPTIMIZERS = ("KFC()", "Adam()", "SGD(0.01, momentum=0.9)")
# Steps until updates are due no more often than their periods say.
START = 80
SIZE = 96


def _application(name: str) -> keras.Model:
    build = getattr(keras.applications, name)
    return build(weights=None, input_shape=(SIZE, SIZE, 3), classes=100)


def _autoencoder() -> keras.Model:
    """A convolutional autoencoder with transposed convolutions, as in Keras's own examples."""
    inputs = tensor = keras.Input((28, 28, 1))
    for filters in (32, 64):
        tensor = layers.Conv2D(filters, 3, 2, "same", activation="relu")(tensor)
    tensor = layers.Dense(16, "relu")(layers.Flatten()(tensor))
    tensor = layers.Reshape((7, 7, 64))(layers.Dense(7 * 7 * 64, "relu")(tensor))
    for filters in (64, 32):
        tensor = layers.Conv2DTranspose(filters, 3, 2, "same", activation="relu")(tensor)
    return keras.Model(
        inputs, layers.Conv2DTranspose(2, 3, 1, "same", activation="softmax")(tensor)
    )


def _discriminator() -> keras.Model:
    """That of Keras's example of a DCGAN, with two classes."""
    inputs = tensor = keras.Input((64, 64, 3))
    for filters in (64, 128, 128):
        tensor = layers.LeakyReLU(0.2)(layers.Conv2D(filters, 4, 2, "same")(tensor))
    tensor = layers.Dropout(0.2)(layers.Flatten()(tensor))
    return keras.Model(inputs, layers.Dense(2, "softmax")(tensor))


def _dense(*units: int, inputs: int = 784) -> keras.Model:
    hidden = [layers.Dense(width, "relu") for width in units[:-1]]
    return keras.Sequential([keras.Input((inputs,)), *hidden, layers.Dense(units[-1], "softmax")])


def _many_classes() -> keras.Model:
    return _dense(256, 10_000, inputs=256)


# Each network with the batch sizes that it is measured at.
NETS: dict[str, tuple[Callable[[], keras.Model], tuple[int, ...]]] = {
    name: (functools.partial(_application, name), (8,))
    for name in (
        "ResNet50",
        "DenseNet121",
        "EfficientNetB0",
        "MobileNetV2",
        "ConvNeXtTiny",
        "VGG16",
    )
}
NETS |= {name: (FAMILIES[name][0], (32,)) for name in ("u-net", "vit", "lstm")}
NETS |= {
    "autoencoder": (_autoencoder, (32,)),
    "discriminator": (_discriminator, (32,)),
    "10,000 classes": (_many_classes, (32,)),
    "dense 1000-500-250": (functools.partial(_dense, 1000, 500, 250, 10), (32, 256)),
    "dense 1500-1500": (functools.partial(_dense, 1500, 1500, 10), (32,)),
}


class Training:
    """A model in training on a batch of noise.

    Args:
        net: Name of the network.
        batch: Number of examples.
        optimizer: The call of the optimizer.
    """

    def __init__(self, net: str, batch: int, optimizer: str):
        keras.utils.set_random_seed(1)
        self.model = NETS[net][0]()
        if optimizer.startswith("KFC"):
            keras_kfc.instrument(self.model)
        self.model.compile(
            optimizer_of(optimizer, 1), "sparse_categorical_crossentropy", jit_compile=False
        )
        rng = np.random.default_rng(0)
        shape, classes = self.model.input_shape[1:], self.model.output_shape[-1]
        images = rng.normal(size=(batch, *shape)).astype("float32")
        labels = rng.integers(0, classes, (batch, *self.model.output_shape[1:-1]))
        self.batch = tf.constant(images), tf.constant(labels)

    def step(self) -> float:
        """Seconds of one step."""
        begin = time.perf_counter()
        self.model.train_on_batch(*self.batch)
        return time.perf_counter() - begin

    def operations(self) -> int:
        """Nodes of the step's graph and of the functions that it calls, traced once more."""
        step = tf.function(self.model.train_step).get_concrete_function(self.batch)
        graph = step.graph.as_graph_def()
        return len(graph.node) + sum(len(own.node_def) for own in graph.library.function)


def first_step(net: str, batch: int, optimizer: str, count: bool) -> dict[str, float]:
    """Seconds of the first step, and peak memory of the process after nine more, in bytes."""
    training = Training(net, batch, optimizer)
    result = {"seconds": training.step()}
    for _ in range(9):
        training.step()
    result["bytes"] = memory_of_process("VmHWM")
    return result | ({"operations": training.operations()} if count else {})


def measure(net: str, batch: int, periods: int, count: bool, kfc: str) -> dict[str, Any]:
    """One row of the table."""
    names = {"KFC": kfc, "Adam": OPTIMIZERS[1], "SGD": OPTIMIZERS[2]}
    options = ["--operations"] if count else []
    fresh = {
        name: in_child_process("benchmarks.deep", ["--first-step", net, str(batch), call, *options])
        for name, call in names.items()
    }
    trainings = {name: Training(net, batch, call) for name, call in names.items()}
    for training in trainings.values():
        training.step()
    start = [trainings["KFC"].step() for _ in range(START - 1)]
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(20 * periods):
        for name, training in trainings.items():
            seconds[name].append(training.step())
    median = {name: statistics.median(times) for name, times in seconds.items()}
    row: dict[str, Any] = {
        "net": net,
        "batch": batch,
        "first step, s": fresh["KFC"]["seconds"],
        "Adam's": fresh["Adam"]["seconds"],
        "ratio": fresh["KFC"]["seconds"] / fresh["Adam"]["seconds"],
        "steps 2-80": statistics.mean(start) / median["Adam"],
        "median": median["KFC"] / median["Adam"],
        "mean": statistics.mean(seconds["KFC"]) / statistics.mean(seconds["Adam"]),
        "slowest / median": max(seconds["KFC"]) / median["KFC"],
        "Adam ms": 1000 * median["Adam"],
        "SGD / Adam": median["SGD"] / median["Adam"],
        "memory": fresh["KFC"]["bytes"] / fresh["Adam"]["bytes"],
    }
    if count:
        row["operations"] = fresh["KFC"]["operations"] / fresh["Adam"]["operations"]
    return row


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.deep", description=__doc__)
    parser.add_argument("--nets", nargs="+", choices=list(NETS), default=list(NETS))
    parser.add_argument("--batches", type=int, nargs="+", help="other batch sizes")
    parser.add_argument("--periods", type=int, default=2, help="of 20 steps each")
    parser.add_argument("--operations", action="store_true", help="count nodes of the graphs")
    parser.add_argument("--kfc", default=OPTIMIZERS[0], help="the call of the optimizer")
    parser.add_argument("--first-step", nargs=3, metavar=("NET", "BATCH", "OPTIMIZER"))
    arguments = parser.parse_args()
    if arguments.first_step:
        net, batch, optimizer = arguments.first_step
        print(json.dumps(first_step(net, int(batch), optimizer, arguments.operations)))
        return
    rows = []
    for net in arguments.nets:
        for batch in arguments.batches or NETS[net][1]:
            row = measure(net, batch, arguments.periods, arguments.operations, arguments.kfc)
            rows.append(row)
            print(
                {k: round(v, 2) if isinstance(v, float) else v for k, v in row.items()}, flush=True
            )
            keras.backend.clear_session()
            gc.collect()
    report("deep", "KFC's steps over Adam's", rows, kfc=arguments.kfc)


if __name__ == "__main__":
    main()
