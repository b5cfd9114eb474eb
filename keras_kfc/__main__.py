"""`python -m keras_kfc`: which versions and devices there are, and whether KFC works on them.

The self-check compares with NumPy what would go wrong first on a new machine: factors, inverses,
a training, XLA, a saved model. It takes ten to fifteen seconds on a processor, imports not counted.
"""

import functools
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import rich.box
import tensorflow as tf
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import keras_kfc

_CLASSES = 3


def main() -> int:
    """Prints what there is, and what works.

    Returns:
        Exit status: 0 if everything works, else 1.
    """
    console = Console(width=100)
    console.print(_versions())
    table = Table(title="Self-check", box=rich.box.SIMPLE)
    for column in ("", "result", "seconds"):
        table.add_column(column, justify="right" if column == "seconds" else "left")
    works = True
    for name, check in CHECKS.items():
        keras.utils.set_random_seed(0)
        begin = time.perf_counter()
        try:
            result = check()
        # Whatever goes wrong is what this is to find out.
        except Exception as error:
            works = False
            result = f"[red]failed[/red]: {type(error).__name__}: {escape(str(error))}"
        table.add_row(name, result, f"{time.perf_counter() - begin:.1f}")
    console.print(table)
    console.print("Everything works." if works else "[red]Something does not work here.[/red]")
    return int(not works)


def _versions() -> Table:
    table = Table(box=rich.box.SIMPLE, show_header=False)
    rows = {
        "keras-kfc": keras_kfc.__version__,
        "Keras": keras.__version__,
        "TensorFlow": tf.__version__,
        "NumPy": np.__version__,
        "Python": f"{platform.python_version()}, {platform.system()} {platform.machine()}",
    }
    for device in tf.config.list_logical_devices():
        details = {}
        if device.device_type == "GPU":
            physical = tf.config.list_physical_devices("GPU")[int(device.name.rsplit(":", 1)[1])]
            details = tf.config.experimental.get_device_details(physical)
        rows[device.name] = details.get("device_name", device.device_type)
    rows["float type"] = f"{keras.config.floatx()}, policy {keras.config.dtype_policy().name}"
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _data(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Images whose classes differ in where they are bright."""
    rng = np.random.default_rng(0)
    labels = np.arange(count) % _CLASSES
    images = rng.normal(size=(count, 6, 6, 2)).astype("float32")
    images[np.arange(count), 2 * labels] += 1.0
    return images, labels


def _net() -> keras.Model:
    layers = keras.layers
    return keras_kfc.instrument(
        keras.Sequential(
            [
                keras.Input((6, 6, 2)),
                layers.Conv2D(4, 3, activation="relu"),
                layers.Flatten(),
                layers.Dense(_CLASSES, activation="softmax"),
            ]
        )
    )


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise AssertionError(what)


def check_factors() -> str:
    """Factors of a convolution and a dense layer, against NumPy's from their definition."""
    images, _ = _data(16)
    model = _net()
    factors = list(
        keras_kfc.kronecker_factors(
            model, images, loss="sparse_categorical_crossentropy", fisher="exact"
        ).values()
    )
    patches = np.lib.stride_tricks.sliding_window_view(images.astype("float64"), (3, 3), (1, 2))
    # Kernel positions before channels, as in Keras's kernels.
    rows = patches.transpose(0, 1, 2, 4, 5, 3).reshape(len(images), 16, 18)
    rows = np.concatenate([rows, np.ones((len(images), 16, 1))], axis=2)
    omega = np.einsum("nti,ntj->ij", rows, rows) / len(images)
    outputs = keras.ops.convert_to_numpy(model(images)).astype("float64")
    gamma = (np.diag(outputs.sum(0)) - outputs.T @ outputs) / len(images)
    errors = [
        np.abs(found - expected).max() / np.abs(expected).max()
        for found, expected in ((factors[0].omega, omega), (factors[1].gamma, gamma))
    ]
    _require(max(errors) < 1e-3, f"relative error {max(errors):.1e}")
    return f"relative error {max(errors):.0e}"


def check_step(jit_compile: bool = False) -> str:
    """One step on a linear least squares problem without damping: Newton's, which solves it.

    Args:
        jit_compile: Whether XLA compiles the step.
    """
    rng = np.random.default_rng(0)
    inputs, solution = rng.normal(size=(64, 3)), rng.normal(size=(3, 1))
    model = keras.Sequential([keras.Input((3,)), keras_kfc.layers.Dense(1, use_bias=False)])
    optimizer = keras_kfc.KFC(
        1.0,
        damping=1e-10,
        momentum=0.0,
        polyak_scaling=None,
        fisher="exact",
        weight_decay=None,
    )
    model.compile(optimizer, "mse", jit_compile=jit_compile)
    model.train_on_batch(inputs, inputs @ solution)
    error = float(np.abs(model.layers[-1].kernel.numpy() - solution).max())
    _require(error < 1e-3, f"error {error:.1e}")
    return f"error {error:.0e}"


def check_training() -> str:
    """The defaults learn, by `fit`; what was saved and loaded goes on as the model itself does."""
    images, labels = _data(192)
    model = _net()
    model.compile(keras_kfc.KFC(seed=0), "sparse_categorical_crossentropy")
    options = {"batch_size": 32, "shuffle": False, "verbose": 0}
    losses = model.fit(images, labels, epochs=10, **options).history["loss"]
    _require(losses[-1] < 0.5 * losses[0], f"loss {losses[0]:.3g} to {losses[-1]:.3g}")
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "model.keras")
        model.save(path)
        loaded = keras.saving.load_model(path)
    for each in (model, loaded):
        each.fit(images, labels, **options)
    pairs = zip(model.get_weights(), loaded.get_weights(), strict=True)
    error = max(float(np.abs(a - b).max()) for a, b in pairs)
    _require(error < 1e-5, f"after loading, difference {error:.1e}")
    return f"loss {losses[0]:.2g} to {losses[-1]:.0e}, loaded: difference {error:.0e}"


CHECKS: dict[str, Callable[[], str]] = {
    "factors, against NumPy": check_factors,
    "a step that solves least squares": check_step,
    "the same, compiled by XLA": functools.partial(check_step, jit_compile=True),
    "training, saving, loading, going on": check_training,
}

if __name__ == "__main__":
    sys.exit(main())
