"""What every rule of the step size must do."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_kfc.steps.api import StepQuery
from keras_kfc.steps.loss_trend import Progress
from keras_kfc.steps.plain import PlainSteps
from keras_kfc.steps.polyak import PolyakSteps
from keras_kfc.steps.trust_region import TrustRegion


def add_variable(shape, dtype, name):
    return keras.Variable(np.zeros(shape), dtype=dtype, name=name)


def polyak(known):
    progress = Progress(add_variable)
    if known is not None:
        for loss in (3.0, 2.5, 2.0):
            progress.observe(tf.constant(loss), tf.constant(known), 32.0)
    rule = PolyakSteps(add_variable, progress)
    rule.build(add_variable, 4)
    return rule, progress


# A line for each rule.
RULES = {
    "plain": PlainSteps,
    "polyak": lambda: polyak(True)[0],
    "polyak, lowest loss unknown": lambda: polyak(False)[0],
    "polyak, loss hidden": lambda: polyak(None)[0],
    "plain in a trust region": lambda: TrustRegion(PlainSteps(), 1e-3, True, polyak(True)[1]),
    "polyak in a trust region": lambda: TrustRegion(polyak(True)[0], 1e-3, False, polyak(True)[1]),
}


def query(
    learning_rate=0.1, scale=1.0, slope=2.0, squares=(4.0, 0.0, 1e-4, 0.0), tables=(False,) * 4
):
    return StepQuery(
        learning_rate=tf.constant(learning_rate),
        momentum=0.9,
        scale=tf.constant(scale),
        slope=tf.convert_to_tensor(slope, tf.float32),
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


def test_a_table_moves_a_fifth_of_the_bound_at_least():
    """`0.2 c s η (1 - μ) / rms(d)`, whatever other layers do; the usual `rms(d)`, unless larger."""
    tables = (True, False, False, False)
    rule, _ = polyak(True)
    # A large promise makes all steps short.
    rates = rule.rates(query(slope=1e9, tables=tables)).numpy()
    np.testing.assert_allclose(rates[0], 0.2 * 0.1 * (1 - 0.9) / 2.0, rtol=1e-6)
    assert 0 < rates[2] < 1e-6 * rates[0]
    # The batch's own length would make the mean step another than along the mean gradient.
    rates = rule.rates(query(slope=1e9, scale=0.5, squares=(1.0, 0, 0, 0), tables=tables)).numpy()
    np.testing.assert_allclose(rates[0], 0.5 * 0.2 * 0.1 * (1 - 0.9) / 2.0, rtol=1e-6)
    # The bound of every layer is that of a table, too.
    longest = rule.longest(query(squares=(1e6, 0, 0, 0)))[0]
    rates = rule.rates(query(slope=1e9, squares=(1e6, 0, 0, 0), tables=tables)).numpy()
    np.testing.assert_allclose(rates[0], longest, rtol=1e-6)
    # Polyak's step, where that is longer.
    far, near = polyak(True)[0], polyak(True)[0]
    asked = {"slope": 0.01, "squares": (1.0, 0, 0, 0)}
    np.testing.assert_array_equal(
        far.rates(query(**asked, tables=tables)), near.rates(query(**asked))
    )
