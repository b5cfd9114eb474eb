"""What every rule of the step size must do."""

import dataclasses

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import few

from keras_kfc.steps.api import QuadraticModel, StepQuery
from keras_kfc.steps.loss_trend import Progress
from keras_kfc.steps.plain import PlainSteps
from keras_kfc.steps.polyak import PolyakSteps
from keras_kfc.steps.quadratic_model import QuadraticSteps
from keras_kfc.steps.trust_region import TrustRegion


def add_variable(shape, dtype, name):
    return keras.Variable(np.zeros(shape), dtype=dtype, name=name)


def polyak(known):
    progress = Progress(add_variable)
    if known is not None:
        for loss in (3.0, 2.5, 2.0):
            progress.observe(tf.constant(loss), tf.constant(known), 32.0)
    rule = PolyakSteps(add_variable, progress)
    rule.build(add_variable, 4, tables=True)
    return rule, progress


class Quadratic:
    """The rule with a model of a batch, whose share it says itself, as the optimizer asks it."""

    def __init__(self):
        self._rule = QuadraticSteps(polyak(True)[0])
        self._share = tf.constant(0.3)

    def _with_model(self, query):
        slopes = tf.stack([query.slope, 0.1 * query.slope])
        curvature = tf.constant([[4.0, 0.5], [0.5, 3.0]])
        model = QuadraticModel(curvature, slopes, tf.constant(1.0), self._share)
        return dataclasses.replace(query, model=model)

    def rates(self, query):
        self._share = self._rule.share(query)
        return self._rule.rates(self._with_model(query))

    def longest(self, query):
        return self._rule.longest(self._with_model(query))

    def momentum(self, query):
        return self._rule.momentum(self._with_model(query))


# A line for each rule.
RULES = {
    "plain": PlainSteps,
    "polyak": lambda: polyak(True)[0],
    "polyak, lowest loss unknown": lambda: polyak(False)[0],
    "polyak, loss hidden": lambda: polyak(None)[0],
    "quadratic, no model": lambda: QuadraticSteps(polyak(True)[0]),
    "quadratic": Quadratic,
    "plain in a trust region": lambda: TrustRegion(PlainSteps(), 1e-3, True, polyak(True)[1]),
    "polyak in a trust region": lambda: TrustRegion(polyak(True)[0], 1e-3, False, polyak(True)[1]),
}


def query(
    learning_rate=0.1,
    scale=1.0,
    slope=2.0,
    squares=(4.0, 0.0, 1e-4, 0.0),
    tables=(False,) * 4,
    table_slope=0.0,
):
    return StepQuery(
        learning_rate=tf.constant(learning_rate),
        momentum=0.9,
        scale=tf.constant(scale),
        slope=tf.convert_to_tensor(slope, tf.float32),
        table_slope=tf.constant(table_slope),
        clipped_slope=tf.convert_to_tensor(0.5 * slope, tf.float32),
        squares=tf.constant(squares),
        tables=tf.constant(tables),
    )


@pytest.mark.parametrize("name", RULES)
def test_rates_are_finite_and_not_negative(name):
    for asked in (query(), query(slope=0.0), query(slope=-1.0), query(squares=(0.0,) * 4)):
        rates = RULES[name]().rates(asked).numpy()
        assert rates.shape == (4,) and np.isfinite(rates).all() and (rates >= 0).all()


@pytest.mark.parametrize("name", RULES)
def test_a_learning_rate_of_zero_stops(name):
    rule = RULES[name]()
    for _ in range(3):
        assert (rule.rates(query()).numpy()[[0, 2]] > 0).all()
    np.testing.assert_array_equal(rule.rates(query(learning_rate=0.0)), 0.0)


@pytest.mark.parametrize("name", RULES)
def test_no_rate_is_beyond_the_longest(name):
    rule = RULES[name]()
    for slope in (1e-6, 1.0, 1e6):
        asked = query(slope=slope)
        rates, longest = rule.rates(asked).numpy(), rule.longest(asked).numpy()
        assert (rates <= longest * (1 + 1e-6)).all()


@pytest.mark.parametrize("name", few(RULES, 3))
def test_momentum_is_below_one_and_asking_for_it_changes_nothing(name):
    for momentum in (0.0, 0.9, 0.99):
        asked, other = RULES[name](), RULES[name]()
        for slope in (5.0, 1e-6, 3.0, 0.0, -1.0, 1e6):
            of_now = dataclasses.replace(query(slope=slope), momentum=momentum)
            value = float(asked.momentum(of_now))
            assert 0 <= value < 1 and value == pytest.approx(float(asked.momentum(of_now)))
            np.testing.assert_array_equal(asked.rates(of_now), other.rates(of_now))


@pytest.mark.parametrize("name", RULES)
def test_a_graph_says_what_eager_mode_says(name):
    eager, graph = RULES[name](), RULES[name]()
    slopes = tf.constant([2.0, 5.0, 0.1])
    # Variables of a rule are made before.
    traced = tf.function(lambda slope: graph.rates(query(slope=slope)), autograph=False)
    for slope in slopes:
        asked = query(slope=float(slope))
        np.testing.assert_allclose(traced(slope), eager.rates(asked), rtol=1e-6)


def test_a_trust_region_bounds_the_fisher_norm():
    """`α² g · F⁻¹ g` of the gradient that is stepped along."""
    rates = RULES["plain in a trust region"]().rates(query(learning_rate=10.0)).numpy()
    excess = float(polyak(True)[1].excess)
    np.testing.assert_allclose(rates**2 * 0.5 * 2.0, 1e-3 * excess, rtol=1e-5)


def test_tables_have_a_ratio_of_their_own():
    """`c s (1 - μ) G / p` with the `p` of tables, whatever others promise, and the reverse."""
    usual = {"squares": (1.0, 1.0, 1.0, 1.0), "learning_rate": 1e6}
    asked = {"tables": (True, False, False, True), **usual}
    rates = polyak(True)[0].rates(query(slope=4.0, table_slope=16.0, **asked)).numpy()
    alone = polyak(True)[0].rates(query(slope=4.0, **usual)).numpy()
    np.testing.assert_allclose(rates, alone * [0.25, 1, 1, 0.25], rtol=1e-6)
    # Averages are apart, too.
    rule = polyak(True)[0]
    for table_slope in (1e9, 2.0, 2.0):
        rates = rule.rates(query(slope=2.0, table_slope=table_slope, **asked)).numpy()
    np.testing.assert_allclose(rates[1:3], polyak(True)[0].rates(query(**usual))[1:3], rtol=1e-6)
    assert (rates[[0, 3]] < 1e-6 * rates[1]).all()
    # The bound of every layer is that of a table, too.
    asked["learning_rate"] = 1e-6
    rates = polyak(True)[0].rates(query(table_slope=16.0, **asked)).numpy()
    np.testing.assert_allclose(rates, 1e-6 * (1 - 0.9), rtol=1e-6)
