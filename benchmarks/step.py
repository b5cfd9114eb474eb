"""Time of a training step of KFC against SGD with momentum and Adam.

Run as `python -m benchmarks.step`; `--help` lists the options. Optimizers take turns,
each for as many steps as all of KFC's periods divide, so that factor and inverse
updates count with their share; medians are shown. The time of the first step, with
tracing and compilation, and the peak memory are those of a process of its own.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import layers

import keras_kfc
from benchmarks.harness import in_child_process, interleaved, memory_of_process, report
from benchmarks.nets import resnet20
from examples.nets import fashion_net

BATCH_SIZE = 256
OPTIMIZERS: dict[str, Callable[[], keras.Optimizer]] = {
    "SGD": lambda: keras.optimizers.SGD(0.01, momentum=0.9),
    "Adam": lambda: keras.optimizers.Adam(),
    "KFC": lambda: keras_kfc.KFC(seed=1),
}


def lenet() -> keras.Model:
    """LeNet on 32x32 images with three channels."""
    return keras.Sequential(
        [
            keras.Input((32, 32, 3)),
            layers.Conv2D(6, 5, activation="relu"),
            layers.MaxPooling2D(),
            layers.Conv2D(16, 5, activation="relu"),
            layers.MaxPooling2D(),
            layers.Flatten(),
            layers.Dense(120, activation="relu"),
            layers.Dense(84, activation="relu"),
            layers.Dense(10, activation="softmax"),
        ]
    )


def wide_mlp() -> keras.Model:
    """A multilayer perceptron 784-1000-500-250-10."""
    hidden = [layers.Dense(units, activation="relu") for units in (1000, 500, 250)]
    return keras.Sequential([keras.Input((784,)), *hidden, layers.Dense(10, "softmax")])


NETS: dict[str, Callable[[], keras.Model]] = {
    "fashion": fashion_net,
    "lenet": lenet,
    "resnet20": resnet20,
    "mlp": wide_mlp,
}


class Training:
    """A model in training on a batch of noise, one optimizer's side of the comparison.

    Args:
        net: Name of the network.
        optimizer: Name of the optimizer.
        jit_compile: Whether to compile the step with XLA.
    """

    def __init__(self, net: str, optimizer: str, jit_compile: bool):
        keras.utils.set_random_seed(1)
        self.model = NETS[net]()
        if optimizer.startswith("KFC"):
            keras_kfc.instrument(self.model)
        self.model.compile(
            optimizer=OPTIMIZERS[optimizer](),
            loss="sparse_categorical_crossentropy",
            jit_compile=jit_compile,
        )
        rng = np.random.default_rng(0)
        images = rng.normal(size=(BATCH_SIZE, *self.model.input_shape[1:])).astype("float32")
        labels = rng.integers(0, 10, size=BATCH_SIZE)
        self._batch = tf.constant(images), tf.constant(labels)

    def run(self, steps: int) -> None:
        """Trains for a number of steps."""
        for _ in range(steps):
            self.model.train_on_batch(*self._batch)


def by_kind(net: str, jit_compile: bool, repeats: int) -> dict[str, Any]:
    """Times of KFC's steps by what is due in them, beside SGD's: where its time goes."""
    sgd, kfc = (Training(net, name, jit_compile) for name in ("SGD", "KFC"))
    optimizer = kfc.model.optimizer
    factors, inverses = optimizer.curvature_update_period, optimizer.inverse_update_period
    for training in (sgd, kfc):
        training.run(_past_the_start(optimizer))
    seconds: dict[str, list[float]] = {"SGD": [], "nothing": [], "factors": [], "both": []}
    for _ in range(repeats):
        for step in range(max(factors, inverses)):
            due = (step % factors == 0) + (step % inverses == 0)
            for name, training in (("SGD", sgd), (list(seconds)[1 + due], kfc)):
                begin = time.perf_counter()
                training.run(1)
                seconds[name].append(time.perf_counter() - begin)
    row: dict[str, Any] = {"net": net, "XLA": "yes" if jit_compile else "no"}
    return row | {f"{name} ms": 1e3 * statistics.median(times) for name, times in seconds.items()}


def _past_the_start(optimizer):
    """Steps until updates are due no more often than their periods say, a multiple of both."""
    period = int(np.lcm(optimizer.curvature_update_period, optimizer.inverse_update_period))
    start = 4 * max(optimizer.curvature_update_period, optimizer.inverse_update_period)
    return -(-start // period) * period


def first_step(net: str, optimizer: str, jit_compile: bool) -> dict[str, float]:
    """Seconds of the first step, and peak memory of the process after a few more, in bytes."""
    training = Training(net, optimizer, jit_compile)
    begin = time.perf_counter()
    training.run(1)
    seconds = time.perf_counter() - begin
    training.run(3)
    return {"seconds": seconds, "bytes": memory_of_process("VmHWM")}


def measure(net: str, jit_compile: bool, repeats: int, cold: bool) -> dict[str, Any]:
    """One row of the table."""
    trainings = {name: Training(net, name, jit_compile) for name in OPTIMIZERS}
    kfc = trainings["KFC"].model.optimizer
    period = int(np.lcm(kfc.curvature_update_period, kfc.inverse_update_period))
    for training in trainings.values():
        training.run(_past_the_start(kfc))
    calls = {name: lambda t=training: t.run(period) for name, training in trainings.items()}
    seconds = interleaved(calls, repeats)
    row: dict[str, Any] = {"net": net, "XLA": "yes" if jit_compile else "no"}
    row |= {f"{name} ms": 1e3 * value / period for name, value in seconds.items()}
    for name in list(OPTIMIZERS)[2:]:
        row[f"{name} / SGD"] = seconds[name] / seconds["SGD"]
    row["KFC / Adam"] = seconds["KFC"] / seconds["Adam"]
    if cold:
        results = {
            name: in_child_process(
                "benchmarks.step", ["--first-step", net, name, *(["--xla"] if jit_compile else [])]
            )
            for name in ("SGD", "KFC")
        }
        row["KFC first step s"] = results["KFC"]["seconds"]
        row["first step KFC / SGD"] = results["KFC"]["seconds"] / results["SGD"]["seconds"]
        row["memory KFC / SGD"] = results["KFC"]["bytes"] / results["SGD"]["bytes"]
    return row


def main() -> None:
    """Runs the measurements."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nets", nargs="+", choices=list(NETS), default=list(NETS))
    parser.add_argument("--xla", action="store_true", help="compile every step with XLA")
    parser.add_argument(
        "--max-factor-dim", type=int, help="another column: KFC with this limit for its factors"
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--no-cold", action="store_true", help="leave out first step and memory")
    parser.add_argument("--first-step", nargs=2, metavar=("NET", "OPTIMIZER"))
    arguments = parser.parse_args()
    if arguments.first_step:
        net, optimizer = arguments.first_step
        print(json.dumps(first_step(net, optimizer, arguments.xla)))
        return
    limit = arguments.max_factor_dim
    if limit is not None:
        OPTIMIZERS[f"KFC({limit})"] = lambda: keras_kfc.KFC(seed=1, max_factor_dim=limit)
    rows = []
    for net in arguments.nets:
        rows.append(measure(net, arguments.xla, arguments.repeats, not arguments.no_cold))
        print(f"{net}: {rows[-1]['KFC / SGD']:.2f} times SGD's step", flush=True)
    name = "step-xla" if arguments.xla else "step"
    report(name, f"Training step, batch {BATCH_SIZE}", rows, repeats=arguments.repeats)
    kinds = [by_kind(net, arguments.xla, 3) for net in arguments.nets]
    report(f"{name}-kinds", "SGD's steps, and KFC's by what is due in them", kinds)


if __name__ == "__main__":
    main()
