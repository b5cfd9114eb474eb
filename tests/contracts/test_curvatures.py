"""What every curvature of a whole network must do.

The natural gradient is a linear, symmetric and positive map of gradients, and there is one for
each covered variable.
"""

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_kfc
from keras_kfc.curvature.api import Curvature
from keras_kfc.curvature.block_diagonal import BlockDiagonal
from keras_kfc.passes.statistics import BatchStatistics

# A line for each curvature: how to make it of variables.
CURVATURES = {
    "block-diagonal": lambda variables, add: BlockDiagonal(variables, add),
    "block-diagonal, diagonal blocks": lambda variables, add: BlockDiagonal(
        variables, add, "diagonal"
    ),
    "block-diagonal, one layer left out": lambda variables, add: BlockDiagonal(
        variables, add, left_out={0}
    ),
}
every = pytest.mark.parametrize("name", CURVATURES)


def add_variable(shape, dtype, name):
    return keras.Variable(np.zeros(shape), dtype=dtype, name=name)


class Example:
    """A network with a curvature that has seen one batch."""

    def __init__(self, name):
        keras.utils.set_random_seed(0)
        stack = [keras.Input((6, 6, 2)), keras.layers.Conv2D(3, 2), keras.layers.Flatten()]
        stack += [keras.layers.BatchNormalization(), keras.layers.Dense(4)]
        self.model = keras_kfc.instrument(keras.Sequential(stack))
        self.variables = self.model.trainable_variables
        self.curvature = CURVATURES[name](self.variables, add_variable)
        rng = np.random.default_rng(0)
        self.inputs = tf.constant(rng.normal(size=(8, 6, 6, 2)), tf.float32)
        with keras_kfc.Capture() as self.capture:
            outputs = self.model(self.inputs)
        derivatives = tf.constant(rng.normal(size=outputs.shape), tf.float32)
        self.derivatives = self.capture.differentiate([outputs], [derivatives])
        self.curvature.note_captured(self.capture)
        self.gradients = [
            {i: tf.constant(rng.normal(size=v.shape), tf.float32) for i, v in self.numbered()}
            for _ in range(2)
        ]

    def numbered(self):
        return enumerate(self.variables)

    def statistics(self):
        moments = {}
        for key, layout in self.curvature.layouts_in(self.capture).items():
            inputs = [use.dense_inputs() for use in self.capture.records[key].uses]
            needed = inputs if layout.needs_inputs else []
            moments[key] = (
                *layout.from_inputs(inputs, tf.constant(8), [None]),
                *layout.from_pass(needed, self.derivatives[key], tf.constant(8), [None]),
            )
        return BatchStatistics(moments, tf.constant(True))

    def update(self):
        refused = self.curvature.update(self.statistics(), tf.constant(8), tf.constant(0.5))
        return int(refused), int(self.curvature.refresh(tf.constant(0.1), True))


@every
def test_members_are_those_of_the_protocol(name):
    example = Example(name)
    members = [member for member in dir(Curvature) if not member.startswith("_")]
    assert all(hasattr(example.curvature, member) for member in members)


@every
def test_the_natural_gradient_is_of_the_covered_variables(name):
    example = Example(name)
    assert example.update() == (0, 0)
    (gradients, _) = example.gradients
    natural = example.curvature.natural_gradient(gradients)
    assert set(natural) == example.curvature.covered
    assert len(natural) == 2 * len(example.curvature.blocks)
    for index, direction in natural.items():
        assert direction.shape == example.variables[index].shape
    # Of a bias alone, too.
    some = {index: gradients[index] for index in list(natural)[1:2]}
    assert set(example.curvature.natural_gradient(some)) == set(some)


@every
def test_the_natural_gradient_is_linear_symmetric_and_positive(name):
    example = Example(name)
    example.update()
    one, other = example.gradients
    natural, others = map(example.curvature.natural_gradient, (one, other))
    both = example.curvature.natural_gradient({i: one[i] + 2 * other[i] for i in one})

    def product(first, second):
        return sum(float(tf.reduce_sum(first[i] * second[i])) for i in natural)

    for index in natural:
        expected = natural[index] + 2 * others[index]
        np.testing.assert_allclose(both[index], expected, rtol=1e-3, atol=1e-4)
    assert product(one, others) == pytest.approx(product(other, natural), rel=1e-4)
    assert product(one, natural) > 0 and product(other, others) > 0


@every
def test_broken_statistics_are_refused(name):
    example = Example(name)
    assert example.update() == (0, 0)
    (gradients, _) = example.gradients
    before = example.curvature.natural_gradient(gradients)
    sound = example.statistics()
    broken = BatchStatistics(sound.moments, tf.constant(False))
    refused = example.curvature.update(broken, tf.constant(8), tf.constant(0.5))
    assert int(refused) == len(example.curvature.blocks)
    assert int(example.curvature.refresh(tf.constant(0.1), True)) == 0
    after = example.curvature.natural_gradient(gradients)
    for index, direction in before.items():
        np.testing.assert_allclose(after[index], direction, rtol=1e-5)
