"""Factors against those of curvlinops, a package for PyTorch that nobody here has written.

It is Eschenhagen et al.'s own reference of both settings of weight sharing.
`write_curvlinops.py` has written its blocks of two small networks.
"""

import pathlib

import keras
import numpy as np
import pytest

import keras_kfc
from conftest import relative_error

STORED = np.load(pathlib.Path(__file__).with_name("curvlinops.npz"))


def network(name: str) -> keras.Model:
    """The network with its stored weights, instrumented."""
    first = {
        "conv": keras.layers.Conv2D(4, (2, 3), activation="tanh"),
        "sequence": keras.layers.Dense(4, activation="tanh"),
    }[name]
    pool = {
        "conv": keras.layers.GlobalAveragePooling2D(),
        "sequence": keras.layers.GlobalAveragePooling1D(),
    }[name]
    inputs = keras.Input(inputs_of(name).shape[1:])
    model = keras.Model(inputs, keras.layers.Dense(3)(pool(first(inputs))))
    for layer, number in ((first, 0), (model.layers[-1], 3)):
        kernel, bias = STORED[f"{name}/{number}.weight"], STORED[f"{name}/{number}.bias"]
        order = (2, 3, 1, 0) if kernel.ndim == 4 else (1, 0)
        layer.set_weights([kernel.transpose(order), bias])
    return keras_kfc.instrument(model)


def inputs_of(name: str) -> np.ndarray:
    x = STORED[f"{name}/x"]
    return x.transpose(0, 2, 3, 1) if x.ndim == 4 else x


def their_block(name: str, setting: str, number: int) -> np.ndarray:
    """Their block of a layer, with rows and columns in the order of `Ω ⊗ Γ`."""
    shapes = [STORED[f"{name}/{key}"].shape for key in ("0.weight", "0.bias", "3.weight", "3.bias")]
    places = np.split(
        np.arange(sum(map(np.prod, shapes))), np.cumsum([np.prod(shape) for shape in shapes])[:-1]
    )
    kernel, bias = (
        places[2 * (number > 0) + i].reshape(shapes[2 * (number > 0) + i]) for i in (0, 1)
    )
    rows = kernel.transpose(2, 3, 1, 0) if kernel.ndim == 4 else kernel.T
    order = np.concatenate([rows.reshape(-1, len(bias)), bias[None]]).ravel()
    return STORED[f"{name}/{setting}"][np.ix_(order, order)]


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("setting", ["expand", "reduce"])
@pytest.mark.parametrize("name", ["conv", "sequence"])
def test_blocks_are_those_of_curvlinops(name, setting):
    model = network(name)
    optimizer = keras_kfc.KFC(0.0, fisher="exact", weight_sharing=setting)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss)
    model.train_on_batch(inputs_of(name), STORED[f"{name}/y"])
    for block, number in zip(optimizer.blocks, (0, 3), strict=True):
        ours = np.kron(block.omega.numpy()[0], block.gamma.numpy()[0])
        theirs = their_block(name, setting, number)
        assert relative_error(ours, theirs) < 1e-9
        other = their_block(name, "reduce" if setting == "expand" else "expand", number)
        # A layer without shared weights has the same block in both settings.
        assert (relative_error(ours, other) > 0.05) == (number == 0)
