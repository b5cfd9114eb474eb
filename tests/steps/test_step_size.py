"""How far steps go: along the mean gradient, within the bound, with a schedule, for any loss."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import few
from keras import ops
from nets import flat_weights

import keras_kfc


def line(outputs=1, inputs=2, use_bias=False, **options):
    """A linear model with KFC."""
    dense = keras_kfc.layers.Dense(outputs, use_bias=use_bias, kernel_initializer="zeros")
    model = keras.Sequential([keras.Input((inputs,)), dense])
    options = {"seed": 1, "weight_decay": None, **options}
    model.compile(keras_kfc.KFC(**options), "mse")
    return model


@pytest.mark.slow
def test_the_mean_step_is_along_the_mean_gradient():
    """Of ten batches one has a gradient a hundred times as large, along another weight.

    A step size that follows the batch at hand makes its steps ten thousand times shorter, so
    that the mean step hardly learns from it.
    """
    rng = np.random.default_rng(0)
    # So small a scale that the weights stay about where they are.
    model = line(
        polyak_scaling=1e-6,
        momentum=0.0,
        fisher="exact",
        curvature_ema=0.999,
        curvature_update_period=1,
        inverse_update_period=1,
    )
    rows = np.eye(2, dtype="float32")
    rare = rng.random(1500) < 0.1
    weights = []
    for large in rare:
        x = np.repeat(rows[None, int(large)], 4, 0)
        model.train_on_batch(x, np.full((4, 1), 100.0 if large else 1.0, "float32"))
        weights.append(flat_weights(model))
    moved = weights[-1] - weights[499]
    assert np.abs(weights[-1]).max() < 0.1
    share = rare[500:].mean()
    gradient = -2 * np.array([(1 - share) * 1.0, share * 100.0])
    block = model.optimizer.blocks[0]
    expected = -block.omega_inverse.numpy()[0].astype("float64") @ gradient
    # Of the mean gradient's two parts, each is followed as much as it should be.
    np.testing.assert_allclose(moved[1] / moved[0], expected[1] / expected[0], rtol=0.2)


@pytest.mark.parametrize("nesterov", [True, False])
def test_no_layer_moves_further_than_the_learning_rate(nesterov):
    """Targets of 1e5, which would have weights leap."""
    rng = np.random.default_rng(1)
    x = rng.normal(size=(64, 3)).astype("float32")
    y = 1e5 * rng.normal(size=(64, 2)).astype("float32")

    def longest(polyak):
        model = line(2, 3, True, learning_rate=0.02, nesterov=nesterov, polyak_scaling=polyak)
        sizes = []
        for start in range(0, 64, 8):
            before = flat_weights(model)
            model.train_on_batch(x[start : start + 8], y[start : start + 8])
            sizes.append(np.sqrt(np.mean((flat_weights(model) - before) ** 2)))
        return max(sizes)

    assert 0.002 < longest(1.0) <= 0.02 * (1 + 1e-4)
    # Steps of the learning rate alone have no bound.
    assert longest(None) > 1.0


def data(seed=3, examples=256):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(examples, 6)).astype("float32")
    y = np.sin(x[:, :1]) + 0.3 * x[:, 1:2] * x[:, 2:3]
    return x, y.astype("float32")


def small_net(loss, optimizer=None, **compiled):
    keras.utils.set_random_seed(5)
    model = keras.Sequential(
        [
            keras.Input((6,)),
            keras_kfc.layers.Dense(16, activation="tanh"),
            keras_kfc.layers.Dense(1),
        ]
    )
    model.compile(optimizer or keras_kfc.KFC(seed=1), loss, **compiled)
    return model


@pytest.mark.nightly
def test_a_schedule_scales_steps_that_are_below_the_bound():
    x, y = data()

    def change(rate):
        optimizer = keras_kfc.KFC(
            0.03, polyak_scaling=0.01, momentum=0.0, seed=1, weight_decay=None
        )
        model = small_net("mse", optimizer)
        model.fit(x, y, batch_size=32, epochs=1, verbose=0, shuffle=False)
        model.optimizer.learning_rate = rate
        before = flat_weights(model)
        model.train_on_batch(x[:32], y[:32])
        return flat_weights(model) - before

    whole, tenth = change(0.03), change(0.003)
    # Below the bound of the smaller rate, or the comparison would be of bounds.
    assert 0 < np.sqrt(np.mean(whole**2)) < 0.003 / 2
    np.testing.assert_allclose(tenth, 0.1 * whole, rtol=1e-3, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("momentum", few([0.9, 0.0], 1))
def test_a_schedule_changes_the_outcome(momentum):
    """Noisy targets: a cosine takes out the noise that constant steps leave."""
    rng = np.random.default_rng(7)
    x = rng.normal(size=(2000, 10)).astype("float32")
    y = (x @ rng.normal(size=(10, 1)) + rng.normal(size=(2000, 1))).astype("float32")
    extended = np.column_stack([x, np.ones(2000)]).astype("float64")
    least = np.linalg.lstsq(extended, y, rcond=None)[0]

    def excess(schedule):
        dense = keras_kfc.layers.Dense(1)
        model = keras.Sequential([keras.Input((10,)), dense])
        optimizer = keras_kfc.KFC(schedule, polyak_scaling=1.0, momentum=momentum, seed=1)
        model.compile(optimizer, "mse")
        model.fit(x, y, batch_size=16, epochs=4, verbose=0, shuffle=False)
        weights = np.vstack([model.get_weights()[0], model.get_weights()[1][None]])
        return np.mean((extended @ (weights - least)) ** 2)

    cosine = keras.optimizers.schedules.CosineDecay(0.03, 500)
    assert excess(cosine) < 0.3 * excess(0.03)


def test_an_unseen_rise_of_the_rate_starts_a_new_reference():
    """A warm-up counts from its top, not from its start."""
    x, y = data()
    model = small_net("mse", keras_kfc.KFC(0.001, seed=1))
    for rate in (0.001, 0.01, 0.03):
        model.optimizer.learning_rate = rate
        model.train_on_batch(x[:32], y[:32])
    assert float(model.optimizer.polyak_steps._highest_rate) == pytest.approx(0.03)


def squared(offset):
    def loss(y_true, y_pred):
        return ops.mean(ops.square(y_true - y_pred), axis=-1) + offset

    return loss


@pytest.mark.nightly
def test_a_constant_in_the_loss_changes_nothing():
    x, y = data()

    def trained(offset):
        model = small_net(squared(offset))
        model.fit(x, y, batch_size=32, epochs=10, verbose=0, shuffle=False)
        return flat_weights(model), float(np.mean((model.predict(x, verbose=0) - y) ** 2))

    plain, error = trained(0.0)
    start = float(np.mean((small_net("mse").predict(x, verbose=0) - y) ** 2))
    assert error < 0.25 * start
    # Negative at the end. Not to the digit: the sum has fewer of them.
    weights, shifted_error = trained(-3.0)
    np.testing.assert_allclose(weights, plain, atol=0.05)
    assert shifted_error < 1.2 * error
    assert trained(1e4)[1] < 2 * error


@pytest.mark.nightly
def test_a_negative_loss_trains():
    x, y = data()

    def minus_correlation(y_true, y_pred):
        a, b = y_true - ops.mean(y_true), y_pred - ops.mean(y_pred)
        return -ops.mean(a * b) / (ops.std(y_true) * ops.std(y_pred) + 1e-6)

    model = small_net(minus_correlation)
    before = model.evaluate(x, y, batch_size=256, verbose=0)
    model.fit(x, y, batch_size=32, epochs=20, verbose=0)
    after = model.evaluate(x, y, batch_size=256, verbose=0)
    assert before > -0.5 and after < -0.9


@pytest.mark.nightly
def test_accumulated_micro_batches_are_the_large_batch():
    """At the default options, but for draws, which cannot be the same."""
    x, y = data(examples=512)

    def trained(batch_size, steps):
        optimizer = keras_kfc.KFC(fisher="exact", seed=1, gradient_accumulation_steps=steps)
        model = small_net("mse", optimizer)
        model.fit(x, y, batch_size=batch_size, epochs=5, verbose=0, shuffle=False)
        return flat_weights(model), model.optimizer

    start = flat_weights(small_net("mse"))
    small, accumulating = trained(8, 8)
    large, optimizer = trained(64, None)
    assert np.abs(large - start).max() > 0.1
    np.testing.assert_allclose(small, large, atol=2e-3)
    for name in ("excess", "_seen", "_examples", "_recent", "_past", "_spread"):
        ours, theirs = (float(getattr(o.progress, name)) for o in (accumulating, optimizer))
        np.testing.assert_allclose(ours, theirs, rtol=2e-3)


def test_factors_weigh_examples_not_batches():
    """257 examples at batch 256: the last one counts like any other."""
    rng = np.random.default_rng(2)
    x = rng.normal(size=(257, 3)).astype("float32")
    x[-1] *= 10
    model = line(1, 3, polyak_scaling=0.0, curvature_update_period=1, weight_sharing="expand")
    model.fit(x, np.zeros((257, 1)), batch_size=256, epochs=1, verbose=0, shuffle=False)
    weights = np.append(np.full(256, 0.95), 1.0)
    # One example makes room for itself only.
    weights[:256] = 1 - 1 / 256
    expected = (weights[:, None] * x).T @ x / weights.sum()
    omega = model.optimizer.blocks[0].omega.numpy()[0]
    np.testing.assert_allclose(omega, expected, rtol=1e-4, atol=1e-6)
    # By batches it would be another.
    by_batches = (0.95 * x[:256].T @ x[:256] / 256 + x[256:].T @ x[256:]) / 1.95
    assert np.abs(omega - by_batches).max() > 1.0


def test_a_step_that_is_skipped_leaves_no_trace():
    x, y = data()
    model = small_net("mse")

    def remembered():
        rule = model.optimizer.polyak_steps
        return [
            variable.numpy().copy()
            for variable in (rule._ratio, rule._ratio_count, rule._squares, rule._squares_count)
        ]

    for _ in range(6):
        model.train_on_batch(x[:32], y[:32])
    weights, rule = flat_weights(model), remembered()
    model.train_on_batch(np.full_like(x[:32], np.nan), y[:32])
    assert int(model.optimizer.skipped_steps) == 1
    np.testing.assert_array_equal(flat_weights(model), weights)
    for before, after in zip(rule, remembered(), strict=True):
        np.testing.assert_array_equal(after, before)
    # A step that is taken is remembered.
    model.train_on_batch(x[:32], y[:32])
    assert all((after != before).any() for before, after in zip(rule, remembered(), strict=True))


def test_rows_that_no_batch_used_stay_where_they_are():
    """An embedding: moments and weights move where tokens were looked up, once for each."""
    keras.utils.set_random_seed(3)
    inputs = keras.Input((3,), dtype="int32")
    embedding = keras.layers.Embedding(10, 4)
    hidden = keras.layers.Flatten()(embedding(inputs))
    model = keras.Model(inputs, keras_kfc.layers.Dense(1)(hidden))
    model.compile(keras_kfc.KFC(seed=1), "mse")
    before = embedding.get_weights()[0]
    tokens = np.array([[1, 2, 2], [2, 5, 1]])
    with tf.GradientTape() as tape:
        loss = model.compute_loss(y=np.ones((2, 1), "float32"), y_pred=model(tokens))
    gradient = tf.convert_to_tensor(tape.gradient(loss, embedding.embeddings.value)).numpy()
    model.train_on_batch(tokens, np.ones((2, 1), "float32"))
    change = embedding.get_weights()[0] - before
    used = [1, 2, 5]
    assert not change[[i for i in range(10) if i not in used]].any()
    # The first step of Adam: each entry by the rate, and the decay of the rows.
    rate = 0.2 * 0.03
    expected = -rate * np.sign(gradient[used]) - 0.2 * 0.02 * rate * before[used]
    np.testing.assert_allclose(change[used], expected, rtol=1e-3)


@pytest.mark.nightly
@pytest.mark.parametrize("units", [4, 40])
def test_a_small_share_of_blocks_is_told_once(units, caplog):
    """Keras's own layer has none: with few units beside a wide dense layer, that is no news."""
    inputs = keras.Input((3, 2))
    hidden = keras.layers.LSTM(units)(inputs)
    model = keras.Model(inputs, keras_kfc.layers.Dense(40)(hidden))
    model.compile(keras_kfc.KFC(seed=1), "mse")
    for _ in range(2):
        model.train_on_batch(np.ones((4, 3, 2)), np.ones((4, 40)))
    dense = 40 * (units + 1)
    share = dense / (dense + 4 * units * (units + 3))
    told = [text for text in (r.getMessage() for r in caplog.records) if "parameters have" in text]
    assert len(told) == (share < 0.5)
    if told:
        assert told[0].startswith(f"{100 * share:.1f}% of the parameters have a block")
