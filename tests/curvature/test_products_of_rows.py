"""Preconditioned rows of gradients, and what they promise, against the gradients themselves."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from keras_kfc.curvature import products
from keras_kfc.curvature.layout import layout_of
from keras_kfc.maps.conv import Conv2DMap
from keras_kfc.maps.dense import DenseMap

ROWS = 6


@dataclasses.dataclass
class Block:
    """What `products` asks of a block, with given inverses."""

    layout: Any
    omega: np.ndarray
    gamma: np.ndarray
    ema_weight = tf.zeros((), tf.float64)
    kernel_index, bias_index = 3, 4

    def costs(self):
        return 1e9, 1.0

    def multiply(self, weights):
        return self.layout.multiply(self.omega, weights, self.gamma)

    def multiply_product(self, inputs, derivatives):
        return self.layout.multiply_product(self.omega, inputs, derivatives, self.gamma)


@dataclasses.dataclass
class Product:
    """Stands for a gradient of known rows."""

    inputs: np.ndarray
    derivatives: np.ndarray
    batch_size: int | None = ROWS
    positions = 1

    @property
    def use(self):
        return self

    @property
    def pre_activation(self):
        return self.derivatives[0]

    def rows(self, dtype):
        return tf.constant(self.inputs, dtype), tf.constant(self.derivatives, dtype)


MAPS = {
    "dense": (DenseMap(9, 4), None),
    "cut": (DenseMap(9, 4), 4),
    "groups": (Conv2DMap((1, 1), 4, 6, groups=2), None),
}


@pytest.mark.parametrize("batch_size", [ROWS, None], ids=["known", "unknown"])
@pytest.mark.parametrize("most", [1e3, 1e-9], ids=["rows", "whole"])
@pytest.mark.parametrize("name", MAPS)
def test_directions_and_slopes_are_those_of_the_gradient(monkeypatch, name, most, batch_size):
    linear_map, max_dim = MAPS[name]
    monkeypatch.setattr(products, "_most_examples", lambda *_: 1e9)
    monkeypatch.setattr(products, "_CHEAPER", most / 1e3)
    layout = layout_of(linear_map, True, max_dim)
    rng = np.random.default_rng(0)
    omega, gamma = rng.normal(size=layout.omega_shape), rng.normal(size=layout.gamma_shape)
    omega, gamma = (part @ part.transpose(0, 2, 1) for part in (omega, gamma))
    groups, rows, columns = layout.block_shape
    inputs = rng.normal(size=(groups, ROWS, rows))
    derivatives = rng.normal(size=(groups, ROWS, columns))
    gradient = inputs.transpose(0, 2, 1) @ derivatives
    wanted = layout.multiply(tf.constant(omega), tf.constant(gradient), tf.constant(gamma))
    found = products.directions_by_rows(
        [Block(layout, omega, gamma)], {3: Product(inputs, derivatives, batch_size)}
    )
    for index, part in zip((3, 4), linear_map.unstack_bias(wanted), strict=True):
        np.testing.assert_allclose(found.of[index], part, rtol=1e-10)
    (slope,) = found.slopes.values()
    assert list(found.slopes) == [(3, 4)]
    np.testing.assert_allclose(slope, np.sum(gradient * wanted), rtol=1e-10)
