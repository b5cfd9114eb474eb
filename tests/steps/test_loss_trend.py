"""What the trend factor of steps follows from, on learning curves whose exponent is known."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import few

import keras_kfc
from keras_kfc.steps.loss_trend import Progress

# So many examples that the average of now has its shortest memory.
BATCH = 64.0


def progress():
    return Progress(
        lambda shape, dtype, name: keras.Variable(np.zeros(shape), dtype=dtype, name=name)
    )


def factors(losses, known=True):
    """The trend factor after each of the losses."""
    seen = progress()
    return observed(seen, losses, known, seen.trend_factor)


def observed(seen, losses, known, result):
    """What a function returns after each of the losses."""

    # One graph: a call for each of thousands of losses takes long.
    @tf.function(autograph=False)
    def run(losses):
        def step(loss):
            seen.observe(loss, tf.constant(known), BATCH)
            return result()

        return tf.map_fn(step, losses, parallel_iterations=1)

    return run(tf.constant(losses, tf.float32)).numpy()


STEPS = np.arange(1, 3001)


@pytest.mark.parametrize("exponent", few([0.1, 0.2, 0.4, 0.8], 1))
@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_a_power_law_has_a_trend_factor_of_its_exponent(exponent, scale):
    factor = factors(scale * STEPS**-exponent)[-1]
    start = 100 / len(STEPS)
    # The means of t^-P with weights t^(k-1) are t^-P k / (k - P); to first order in P, the
    # logarithm of their ratio is 0.4 P.
    estimate = np.log(2 / (2 - exponent) / (10 / (10 - exponent))) / 0.4
    assert abs(estimate / exponent - 1) < 0.35
    expected = start + (1 - start) * 3 * estimate
    assert abs(factor / expected - 1) < 0.02
    noisy = np.random.default_rng(0).gamma(100, 0.01, size=len(STEPS))
    assert abs(factors(scale * noisy * STEPS**-exponent)[-1] / factor - 1) < 0.15


def test_means_weigh_examples_by_powers_of_their_number():
    # With a trend, or weights that are one step off would hardly show.
    rng = np.random.default_rng(0)
    losses = rng.uniform(1, 2, size=500) + np.linspace(9, 0, 500)
    sizes = rng.integers(32, 200, size=500)
    seen = progress()
    observe = tf.function(seen.observe)
    for loss, size in zip(losses, sizes, strict=True):
        observe(
            tf.constant(loss, tf.float32), tf.constant(True), tf.constant(size, dtype=tf.float32)
        )
    # The weight of each example, integrated over the examples of a batch.
    ends = np.cumsum(sizes).astype("float64")
    for average, power in ((seen._past, 2), (seen._recent, 10)):
        weights = ends**power - (ends - sizes) ** power
        np.testing.assert_allclose(
            float(average.value), np.average(losses, weights=weights), rtol=1e-4
        )
    weights = sizes * 0.9 ** np.arange(500)[::-1]
    np.testing.assert_allclose(
        float(seen.excess.value), np.average(losses, weights=weights), rtol=1e-5
    )


def test_a_batch_counts_by_its_examples():
    """One of 48 is one of 16 and one of 32 with their mean loss; small ones are kept for longer."""
    whole, parts = progress(), progress()
    for seen, batches in (
        (whole, [(4.0, 64), (2.0, 48)]),
        (parts, [(4.0, 64), (1.0, 16), (2.5, 32)]),
    ):
        for loss, size in batches:
            seen.observe(tf.constant(loss), tf.constant(True), size)
    # 64 examples are left of by a tenth in one step, or by a half and a tenth in two.
    assert float(whole.excess) == pytest.approx((0.9 * 64 * 4 + 48 * 2) / (0.9 * 64 + 48))
    kept = 0.9 * 64
    assert float(parts.excess) == pytest.approx(
        (0.9 * (kept * 4 + 16 * 1) + 32 * 2.5) / (0.9 * (kept + 16) + 32)
    )
    single = progress()
    for loss in (8.0, 4.0, 2.0):
        single.observe(tf.constant(loss), tf.constant(True), 1.0)
    kept = 31 / 32
    expected = (kept**2 * 8 + kept * 4 + 2) / (kept**2 + kept + 1)
    assert float(single.excess) == pytest.approx(expected)


def test_parts_of_a_batch_count_once_it_is_complete():
    one, other = progress(), progress()
    one.observe(tf.constant(3.0), tf.constant(True), 8.0, tf.constant(False))
    assert not bool(one.seen)
    one.observe(tf.constant(1.0), tf.constant(True), 24.0, tf.constant(True))
    other.observe(tf.constant(1.5), tf.constant(True), 32.0)
    for name in ("excess", "_recent", "_past", "_seen", "_examples"):
        assert float(getattr(one, name)) == pytest.approx(float(getattr(other, name)))


@pytest.mark.parametrize("offset", [0.0, -7.0, 1000.0])
def test_the_gap_of_an_unknown_lowest_loss_is_told_by_the_fall(offset):
    """Of curves that fall with the ordinary exponent it is what is above their end."""
    seen = progress()
    steps = np.arange(1, 2001)
    gaps = observed(seen, 5 * steps ** (-1 / 3) + offset, False, seen.gap)
    assert gaps[-1] == pytest.approx(5 * 2000 ** (-1 / 3), rel=0.02)


def test_the_gap_of_a_loss_that_hovers_goes_with_its_spread():
    rng = np.random.default_rng(1)
    seen = progress()
    gaps = observed(seen, rng.normal(50.0, 2.0, size=3000), False, seen.gap)
    # The mean distance of a normal number is 0.8 deviations.
    assert 0.2 * 1.6 < np.mean(gaps[59:99]) < 1.5 * 1.6
    assert np.mean(gaps[1999:2999]) < 0.1 * 1.6


def test_a_loss_that_stays_slows_down_and_one_that_goes_speeds_up():
    constant = factors(np.ones(1000))
    np.testing.assert_allclose(constant[:100], 1, rtol=1e-6)
    np.testing.assert_allclose(constant[-1], 100 / 1000, rtol=1e-3)
    assert factors(0.98 ** np.arange(1000.0))[-1] == pytest.approx(0.1 + 0.9 * 10)
    rising = factors(1.01 ** np.arange(1000.0))
    assert max(rising) == pytest.approx(1)


def test_the_start_says_nothing():
    assert set(factors(10.0 ** -np.arange(0, 10, 0.1))) == {1.0}


def test_losses_that_are_not_finite_leave_no_trace():
    losses = [3.0, np.nan, 2.0, np.inf, 1.0]
    one, other = progress(), progress()
    for loss in losses:
        one.observe(tf.constant(loss), tf.constant(True), BATCH)
        if np.isfinite(loss):
            other.observe(tf.constant(loss), tf.constant(True), BATCH)
    for name in ("excess", "_recent", "_past", "_seen"):
        assert float(getattr(one, name)) == float(getattr(other, name))
    one.forget()
    assert not bool(one.seen) and float(one.trend_factor()) == 1


def test_a_loss_of_zero_is_no_error():
    assert np.isfinite(factors([0.0] * 200)).all()
    assert np.isfinite(factors([1.0] * 200 + [0.0] * 200)).all()


@pytest.mark.parametrize(("loss", "share"), [(0.3, 0.4), (-0.3, 0.4), (-2.0, 0.0), (0.0, 1.0)])
def test_the_share_of_noise_is_between_zero_and_one(loss, share):
    """`1 - 2 |E| / p`, also where rounding puts a loss below its lowest value."""
    one = progress()
    one.observe(tf.constant(loss), tf.constant(True))
    assert float(one.noise_share(tf.constant(1.0))) == pytest.approx(share, abs=1e-6)


@pytest.mark.nightly
def test_a_checkpoint_goes_on_at_its_trend(tmp_path):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(64, 4)).astype("f")
    y = rng.normal(size=(64, 2)).astype("f")
    model = keras.Sequential([keras.Input((4,)), keras_kfc.layers.Dense(2)])
    model.compile(keras_kfc.KFC(seed=1), "mse")
    model.fit(x, y, batch_size=1, epochs=12, verbose=0)
    factor = float(model.optimizer.progress.trend_factor())
    # Targets are noise: what can be learned is learned.
    assert factor < 0.9
    model.save(tmp_path / "model.keras")
    restored = keras.models.load_model(tmp_path / "model.keras")
    assert float(restored.optimizer.progress.trend_factor()) == factor
