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
from keras_kfc.maps.weights import VariableIndices

ROWS = 6


@dataclasses.dataclass
class Block:
    """What `products` asks of a block, with given inverses."""

    layout: Any
    omega: np.ndarray
    gamma: np.ndarray
    indices: VariableIndices
    ema_weight = tf.zeros((), tf.float64)
    kernel_index = 3

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
    gradients: tuple[Any, ...]
    batch_size: int | None
    positions: int

    @property
    def use(self):
        return self

    @property
    def pre_activation(self):
        return self.derivatives[0]

    def rows(self, dtype):
        return tf.constant(self.inputs, dtype), tf.constant(self.derivatives, dtype)


MAPS = {
    "dense": (DenseMap(9, 4), True, None),
    "without a bias": (DenseMap(9, 4), False, None),
    "cut": (DenseMap(9, 4), True, 4),
    "groups": (Conv2DMap((1, 1), 4, 6, groups=2), True, None),
}


@pytest.mark.parametrize(
    ("batch_size", "most", "positions", "way"),
    [
        (ROWS, 1e9, 1, "_by_rows"),
        (None, 1e9, 1, "_by_rows"),
        (None, 1.0, 1, "_whole"),
        (None, 1.0, 2, "_whole"),
        (ROWS, 1.0, 1, None),
    ],
)
@pytest.mark.parametrize("name", MAPS)
def test_directions_and_slopes_are_those_of_the_gradient(
    monkeypatch, name, batch_size, most, positions, way
):
    linear_map, use_bias, max_dim = MAPS[name]
    taken = []
    for function in ("_by_rows", "_whole"):
        own = getattr(products, function)

        def noted(*pair, own=own, function=function):
            taken.append(function)
            return own(*pair)

        monkeypatch.setattr(products, function, noted)
    monkeypatch.setattr(products, "_most_examples", lambda _: most)
    monkeypatch.setattr(products, "_FEWEST", 1)
    layout = layout_of(linear_map, use_bias, max_dim)
    rng = np.random.default_rng(0)
    omega, gamma = rng.normal(size=layout.omega_shape), rng.normal(size=layout.gamma_shape)
    omega, gamma = (part @ part.transpose(0, 2, 1) for part in (omega, gamma))
    groups, rows, columns = layout.block_shape
    inputs = rng.normal(size=(groups, ROWS, rows))
    derivatives = rng.normal(size=(groups, ROWS, columns))
    gradient = inputs.transpose(0, 2, 1) @ derivatives
    apart = linear_map.unstack_bias(tf.constant(gradient))
    parts = tuple(part for part in apart if part is not None)
    block = Block(layout, omega, gamma, VariableIndices((3,), 4 if use_bias else None, (rows,)))
    product = Product(inputs, derivatives, parts, batch_size, positions)
    found = products.directions_by_rows([block], {3: product})
    assert taken == ([] if way is None else [way])
    if way is None:
        assert not found.of and not found.slopes
        return
    wanted = layout.multiply(tf.constant(omega), tf.constant(gradient), tf.constant(gamma))
    indices = (3, 4) if use_bias else (3,)
    for index, part in zip(indices, linear_map.unstack_bias(wanted), strict=False):
        np.testing.assert_allclose(found.of[index], part, rtol=1e-10)
    assert list(found.slopes) == [indices] and set(found.of) == set(indices)
    np.testing.assert_allclose(found.slopes[indices], np.sum(gradient * wanted), rtol=1e-10)


def test_rows_are_taken_up_to_the_batch_at_which_they_cost_as_much():
    """Products counted one by one, of two layers together."""
    layouts = [layout_of(DenseMap(300, 200), True, None), layout_of(DenseMap(40, 700), True, 300)]
    pairs = []
    for layout, positions in zip(layouts, (1, 3), strict=True):
        inverses = (np.zeros(layout.omega_shape), np.zeros(layout.gamma_shape))
        block = Block(layout, *inverses, VariableIndices((3,), 4, (0,)))
        block.costs = layout.costs
        pairs.append((block, Product(*inverses, (), None, positions)))

    def excess(examples):
        total = 0.0
        for layout, positions in zip(layouts, (1, 3), strict=True):
            r, (_, n, m) = examples * positions, layout.block_shape
            c, t = layout.omega_shape[1], layout.gamma_shape[1]
            by_rows = r * (n * c + m * t) + r * r * (n + m)
            total += by_rows - products._CHEAPER * n * m * (c + t)
        return total

    most = products._most_examples(pairs)
    assert excess(0.999 * most) < 0 < excess(1.001 * most)
