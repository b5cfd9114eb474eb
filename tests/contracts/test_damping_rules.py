"""What every rule of damping must do."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_kfc import KFC
from keras_kfc.steps.api import DampingRule
from keras_kfc.steps.damping import GivenDamping
from keras_kfc.steps.levenberg_marquardt import LevenbergMarquardt

SCHEDULE = keras.optimizers.schedules.ExponentialDecay(0.5, 10, 0.1)


def of_an_optimizer(damping):
    optimizer = KFC(damping=damping)
    return GivenDamping(lambda: optimizer.damping, True)


def adaptive():
    held = keras.Variable(0.3)
    return LevenbergMarquardt(held, lambda shape, dtype, name: keras.Variable(0.0), True)


# A line for each rule.
RULES = {
    "number": lambda: GivenDamping(lambda: 0.3, False),
    "nothing": lambda: GivenDamping(lambda: 0.0, True),
    "adaptive": adaptive,
    "of an optimizer": lambda: of_an_optimizer(0.2),
    "schedule of an optimizer": lambda: of_an_optimizer(SCHEDULE),
}


@pytest.mark.parametrize("name", RULES)
def test_damping_is_a_finite_number_that_is_not_negative(name):
    rule = RULES[name]()
    damping = rule.damping()
    assert damping.dtype == tf.float32 and damping.shape == ()
    assert np.isfinite(damping) and damping >= 0
    assert isinstance(rule.relative, bool)
    assert all(hasattr(rule, member) for member in dir(DampingRule) if not member.startswith("_"))


@pytest.mark.parametrize("name", RULES)
def test_reading_changes_nothing_and_a_graph_says_the_same(name):
    rule = RULES[name]()
    graph = tf.function(rule.damping, autograph=False)
    values = [float(rule.damping()), float(graph()), float(rule.damping()), float(graph())]
    assert values == 4 * values[:1]


def test_a_value_that_is_set_acts_on_a_traced_rule():
    optimizer = KFC(damping=0.2)
    rule = GivenDamping(lambda: optimizer.damping, True)
    graph = tf.function(rule.damping, autograph=False)
    assert float(graph()) == pytest.approx(0.2)
    optimizer.damping = 0.7
    assert float(graph()) == pytest.approx(0.7)
