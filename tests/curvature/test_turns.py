"""Blocks take turns: which are inverted together, and that each comes up."""

import keras
import numpy as np
import pytest

import keras_kfc
from keras_kfc.curvature import turns as module
from keras_kfc.curvature.turns import turns


class Layout:
    def __init__(self, sizes):
        self.inverse_shapes = {str(n): (1, size, size) for n, size in enumerate(sizes)}


class Block:
    def __init__(self, *sizes):
        self.layout = Layout(sizes)

    @property
    def cost(self):
        return sum(shape[1] ** 3 for shape in self.layout.inverse_shapes.values())


def test_cheap_blocks_are_inverted_all_at_once():
    blocks = [Block(10, 20), Block(500, 30)]
    (group,) = turns(blocks)
    assert set(group) == set(blocks)


@pytest.mark.parametrize("most", [1, 3, 8])
def test_costly_blocks_are_shared_out(most):
    rng = np.random.default_rng(0)
    blocks = [Block(*sizes) for sizes in rng.integers(10, 600, (60, 2)).tolist()]
    groups = turns(blocks, most)
    assert sorted(map(id, blocks)) == sorted(id(b) for group in groups for b in group)
    assert len(groups) == min(most, round(sum(b.cost for b in blocks) / 1e9))
    costs = [sum(b.cost for b in group) for group in groups]
    assert max(costs) < sum(costs) / len(groups) + max(b.cost for b in blocks)


def test_one_block_that_costs_more_than_all_others_leaves_no_group_empty():
    assert [len(group) for group in turns([Block(2000), Block(5), Block(6)])] == [2, 1]


def test_every_block_has_its_turn_and_the_inverse_of_its_factors(monkeypatch):
    """After the start: one group in a step, each once in a period, as `NumPy` inverts them."""
    monkeypatch.setattr(module, "_AT_ONCE", 1000.0)
    keras.utils.set_random_seed(1)
    model = keras.Sequential([keras.Input((6,))])
    for units in (7, 8, 9):
        model.add(keras_kfc.layers.Dense(units, "tanh"))
    optimizer = keras_kfc.KFC(
        seed=1,
        curvature_update_period=1,
        inverse_update_period=6,
        damping=0.3,
        relative_damping=False,
        weight_sharing="expand",
    )
    model.compile(optimizer, "mse")
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(16, 6)).astype("float32"), rng.normal(size=(16, 9)).astype("float32")
    changed = {}
    for step in range(24 + 12):
        before = [block.gamma_inverse.numpy() for block in optimizer.blocks]
        model.train_on_batch(x, y)
        if step < 8:
            continue
        for number, block in enumerate(optimizer.blocks):
            inverse = block.gamma_inverse.numpy()
            if before and (inverse != before[number]).any():
                changed.setdefault(step, []).append(number)
                omega, gamma = (f.numpy()[0].astype("float64") for f in (block.omega, block.gamma))
                pi = np.sqrt(np.trace(omega) / len(omega) / (np.trace(gamma) / len(gamma)))
                shift = np.sqrt(0.3) / pi * np.eye(len(gamma))
                np.testing.assert_allclose(inverse[0], np.linalg.inv(gamma + shift), rtol=1e-3)
    # At first all together, then one after the other.
    assert changed[8] == [0, 1, 2]
    late = {step: blocks for step, blocks in changed.items() if step >= 24}
    assert late == {25: [0], 26: [1], 27: [2], 31: [0], 32: [1], 33: [2]}
