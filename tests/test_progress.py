"""What the pace of steps follows from, on learning curves whose exponent is known."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_kfc
from keras_kfc.progress import Progress


def progress():
    return Progress(
        lambda shape, dtype, name: keras.Variable(np.zeros(shape), dtype=dtype, name=name)
    )


def paces(losses, known=True):
    """The pace after each of the losses."""
    seen = progress()

    @tf.function
    def step(loss):
        seen.observe(loss, tf.constant(known))
        return seen.pace()

    return [float(step(tf.constant(loss, tf.float32))) for loss in losses]


STEPS = np.arange(1, 3001)


@pytest.mark.parametrize("exponent", [0.1, 0.2, 0.4, 0.8])
@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_a_power_law_has_a_pace_of_its_exponent(exponent, scale):
    pace = paces(scale * STEPS**-exponent)[-1]
    start = 100 / len(STEPS)
    # The means of t^-P with weights t^(k-1) are t^-P k / (k - P); to first order in P, the
    # logarithm of their ratio is 0.4 P.
    estimate = np.log(2 / (2 - exponent) / (10 / (10 - exponent))) / 0.4
    assert abs(estimate / exponent - 1) < 0.35
    expected = start + (1 - start) * 3 * estimate
    assert abs(pace / expected - 1) < 0.02
    noisy = np.random.default_rng(0).gamma(100, 0.01, size=len(STEPS))
    assert abs(paces(scale * noisy * STEPS**-exponent)[-1] / pace - 1) < 0.15


def test_means_weigh_steps_by_powers_of_their_number():
    # With a trend, or weights that are one step off would hardly show.
    losses = np.random.default_rng(0).uniform(1, 2, size=500) + np.linspace(9, 0, 500)
    seen = progress()
    for loss in losses:
        seen.observe(tf.constant(loss, tf.float32), tf.constant(True))
    steps = np.arange(1.0, 501)

    def rising(power):
        """(t - 1) (t - 2) ..., so many factors: what the recursion makes of t^power."""
        return np.prod([steps - 1 - i for i in range(power)], axis=0)

    for average, power in ((seen._past, 1), (seen._recent, 9)):
        expected = np.average(losses, weights=np.maximum(rising(power), 0))
        np.testing.assert_allclose(float(average.value), expected, rtol=1e-5)
    weights = 0.9 ** np.arange(500)[::-1]
    np.testing.assert_allclose(
        float(seen.excess.value), np.average(losses, weights=weights), rtol=1e-5
    )


def test_a_loss_that_stays_slows_down_and_one_that_goes_speeds_up():
    constant = paces(np.ones(1000))
    np.testing.assert_allclose(constant[:100], 1)
    np.testing.assert_allclose(constant[-1], 100 / 1000, rtol=1e-3)
    assert paces(0.98 ** np.arange(1000.0))[-1] == pytest.approx(0.1 + 0.9 * 10)
    rising = paces(1.01 ** np.arange(1000.0))
    assert max(rising) == pytest.approx(1)


def test_the_start_says_nothing():
    assert set(paces(10.0 ** -np.arange(0, 10, 0.1))) == {1.0}


def test_losses_that_are_not_finite_leave_no_trace():
    losses = [3.0, np.nan, 2.0, np.inf, 1.0]
    one, other = progress(), progress()
    for loss in losses:
        one.observe(tf.constant(loss), tf.constant(True))
        if np.isfinite(loss):
            other.observe(tf.constant(loss), tf.constant(True))
    for name in ("excess", "_recent", "_past", "_seen"):
        assert float(getattr(one, name)) == float(getattr(other, name))
    one.forget()
    assert not bool(one.seen) and float(one.pace()) == 1


def test_a_loss_of_zero_is_no_error():
    assert np.isfinite(paces([0.0] * 200)).all()
    assert np.isfinite(paces([1.0] * 200 + [0.0] * 200)).all()


def test_a_checkpoint_goes_on_at_its_pace(tmp_path):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(64, 4)).astype("f")
    y = rng.normal(size=(64, 2)).astype("f")
    model = keras.Sequential([keras.Input((4,)), keras_kfc.layers.Dense(2)])
    model.compile(keras_kfc.KFC(seed=1), "mse")
    model.fit(x, y, batch_size=1, epochs=3, verbose=0)
    pace = float(model.optimizer.progress.pace())
    # Targets are noise: what can be learned is learned.
    assert pace < 0.9
    model.save(tmp_path / "model.keras")
    restored = keras.models.load_model(tmp_path / "model.keras")
    assert float(restored.optimizer.progress.pace()) == pace
