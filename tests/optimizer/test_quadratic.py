"""Steps of a quadratic model: exact where theory says so, judged, and kept or taken back."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import few

import keras_kfc
from conftest import explicit_ggn, relative_error
from keras_kfc.optimizer.batch_models import check_alone
from keras_kfc.steps.api import QuadraticModel
from keras_kfc.steps.levenberg_marquardt import LevenbergMarquardt
from keras_kfc.steps.quadratic_model import minimum

SETTINGS = {"step": "quadratic", "seed": 0, "weight_decay": None, "fisher": "exact"}


def linear_problem():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(50, 6)) * 10 ** np.linspace(-0.5, 0.5, 6)
    y = x @ rng.normal(size=(6, 3)) + rng.normal(size=(50, 3))
    model = keras.Sequential([keras.Input((6,)), keras_kfc.layers.Dense(3)])
    return model, x, y


def model_of(curvature, slopes, longest=np.inf, share=1.0):
    values = (np.asarray(v, "float32") for v in (curvature, slopes, longest, share))
    return QuadraticModel(*map(tf.constant, values))


def test_the_minimum_is_that_of_two_unknowns():
    """Nowhere on a grid of rates and momenta is the model lower, by its definition in NumPy."""
    rng = np.random.default_rng(0)
    rates, momenta = np.meshgrid(np.linspace(0, 5, 81), np.linspace(0, 0.95, 39))
    grid = np.stack([-rates.ravel(), momenta.ravel()])
    inside = 0
    for _ in range(60):
        root = rng.normal(size=(2, 3))
        curvature, slopes = root @ root.T, rng.normal(size=2)
        found = minimum(model_of(curvature, slopes))
        values = slopes @ grid + 0.5 * np.sum(grid * (curvature @ grid), axis=0)
        best = float(model_of(curvature, slopes).change(found.rate, found.momentum))
        step = np.linalg.solve(curvature, -slopes)
        if step[0] <= 0 and 0 <= step[1] <= 0.95:
            inside += 1
            np.testing.assert_allclose([found.rate, found.momentum], [-step[0], step[1]], rtol=1e-3)
            assert best <= values.min() + 1e-4
        assert best <= 1e-6
    assert inside > 2


def test_directions_that_are_one_have_one_unknown():
    alike = minimum(model_of([[4.0, -4.0], [-4.0, 4.0]], [2.0, -2.0]))
    assert float(alike.momentum) == 0 and float(alike.rate) == pytest.approx(0.5)
    first = minimum(model_of([[4.0, 0.0], [0.0, 0.0]], [2.0, 0.0]))
    assert float(first.momentum) == 0 and float(first.rate) == pytest.approx(0.5)
    assert float(minimum(model_of([[4.0, 0.0], [0.0, 0.0]], [2.0, 0.0], 0.1)).rate) == (
        pytest.approx(0.1)
    )


def test_a_step_is_the_exact_minimiser_on_a_linear_model_with_squared_error():
    """Over the direction and the last step, with the explicit matrix and explicit damping."""
    keras.config.set_floatx("float64")
    model, x, y = linear_problem()
    optimizer = keras_kfc.KFC(10.0, **SETTINGS)
    model.compile(optimizer, "mse")
    model.train_on_batch(x, y)
    model.train_on_batch(x, y)
    (block,) = optimizer.blocks
    variables = [v.value for v in model.trainable_variables]
    loss = keras.losses.MeanSquaredError()
    fisher = explicit_ggn(model, tf.constant(x), variables, lambda outputs: loss(y, outputs))
    both = 0
    for _ in range(5):
        before = np.concatenate([v.numpy().ravel() for v in variables])
        last = np.concatenate([m.numpy().ravel() for m in optimizer.parts.momentums])
        with tf.GradientTape() as tape:
            value = loss(y, model(x))
        gradients = tape.gradient(value, variables)
        shift = float(optimizer.damping) * np.trace(fisher) / len(fisher)
        model.train_on_batch(x, y)
        # The inverses of this step, which may be new.
        stacked = block.layout.linear_map.stack_bias(*gradients)
        direction = block.multiply(stacked).numpy().reshape(-1)
        gradient = np.concatenate([g.numpy().ravel() for g in gradients])
        basis = np.stack([-direction, last], axis=1)
        matrix = fisher + shift * np.eye(len(fisher))
        solution = np.linalg.solve(basis.T @ matrix @ basis, -basis.T @ gradient)
        both += solution[1] > 0
        if solution[1] < 0:
            # The momentum stays at its bound.
            alone = -(direction @ gradient) / (direction @ matrix @ direction)
            solution = np.array([-alone, 0.0])
        assert solution[1] < 0.95
        change = np.concatenate([v.numpy().ravel() for v in variables]) - before
        assert relative_error(change, basis @ solution) < 1e-4
        assert relative_error(change, basis @ (solution * [0.9, 1.0])) > 1e-2  # control
    assert both > 1


@pytest.mark.slow
def test_damping_falls_where_the_model_is_exact():
    model, x, y = linear_problem()
    optimizer = keras_kfc.KFC(10.0, **SETTINGS)
    model.compile(optimizer, "mse")
    first = float(optimizer.damping)
    model.fit(x, y, batch_size=50, epochs=20, verbose=0)
    assert float(optimizer.damping) < 0.3 * first


@pytest.mark.nightly
def test_damping_follows_the_ratio():
    def after(change, foretold, share=1.0, times=1):
        held = keras.Variable(0.2)
        rule = LevenbergMarquardt(held, lambda shape, dtype, name: keras.Variable(0.0), True)
        for _ in range(times):
            kept = rule.judge(
                tf.constant(1.0),
                1.0 + tf.constant(change),
                tf.constant(foretold),
                tf.constant(share),
            )
        return float(held.numpy()), bool(kept)

    assert after(-0.1, -0.1) == (pytest.approx(0.2 * 0.95**5), True)
    assert after(-0.05, -0.1) == (pytest.approx(0.2), True)
    assert after(-0.01, -0.1) == (pytest.approx(0.2 / 0.95**5), True)
    assert after(0.01, -0.1) == (pytest.approx(0.2 / 0.95**5), False)
    for broken in (np.nan, np.inf):
        assert after(broken, -0.1) == (pytest.approx(0.2 / 0.95**5), False)
    assert after(-0.1, -0.1, times=200)[0] == pytest.approx(1e-3)
    assert after(0.1, -0.1, times=200)[0] == pytest.approx(10.0)
    # What rounding hides says nothing.
    assert after(1e-7, -1e-7) == (pytest.approx(0.2), True)
    # Short steps of noisy gradients are foretold well whatever damping is.
    assert after(-0.1, -0.1, share=0.4, times=200)[0] == pytest.approx(0.15 * 0.6)


def steep(y_true, y_pred):
    """Bends far more than its second derivative at zero says."""
    return tf.square(y_pred - 1.0) + 1e4 * y_pred**4 + 0 * y_true


def one_weight():
    layer = keras_kfc.layers.Dense(1, use_bias=False, kernel_initializer="zeros")
    return keras.Sequential([keras.Input((1,)), layer])


@pytest.mark.slow
def test_a_step_that_makes_the_loss_worse_is_taken_back():
    model = one_weight()
    optimizer = keras_kfc.KFC(10.0, **SETTINGS)
    model.compile(optimizer, steep)
    x = np.ones((4, 1))
    model.train_on_batch(x, x)
    assert float(optimizer.damping) > 0.15
    np.testing.assert_array_equal(model.get_weights()[0], 0)
    np.testing.assert_array_equal(optimizer.parts.momentums[0], 0)
    plain = one_weight()
    plain.compile(keras_kfc.KFC(10.0, seed=0), steep)
    plain.train_on_batch(x, x)
    assert plain.get_weights()[0] > 0.01  # the other rule goes on


def noisy_net(dropout=0.3):
    keras.utils.set_random_seed(3)
    inputs = keras.Input((4,))
    hidden = keras_kfc.layers.Dense(8, activation="relu")(inputs)
    hidden = keras.layers.Dropout(dropout, seed=1)(keras_kfc.layers.BatchNormalization()(hidden))
    outputs = {name: keras_kfc.layers.Dense(2, name=name)(hidden) for name in ("a", "b")}
    return keras.Model(inputs, outputs)


def noisy_data():
    rng = np.random.default_rng(0)
    return rng.normal(size=(32, 4)), {name: rng.normal(size=(32, 2)) for name in ("a", "b")}


@pytest.mark.nightly
def test_trying_a_step_leaves_no_trace():
    """Averages, states of random numbers and metrics are those of one forward pass."""
    x, y = noisy_data()
    results = []
    for step in ("polyak", "quadratic"):
        model = noisy_net()
        model.compile(keras_kfc.KFC(step=step, seed=0), {"a": "mse", "b": "mse"})
        logs = model.train_on_batch(x, y, return_dict=True)
        state = [v.numpy() for v in model.non_trainable_variables]
        results.append((logs, state, model.layers[1].kernel.numpy()))
    (logs, state, kernel), (other_logs, other_state, other_kernel) = results
    assert len(state) >= 3 and len(logs) >= 3
    for name, value in logs.items():
        assert other_logs[name] == pytest.approx(value, rel=1e-5), name
    for value, other in zip(state, other_state, strict=True):
        np.testing.assert_allclose(other, value, rtol=1e-5)
    assert relative_error(other_kernel, kernel) > 1e-4


@pytest.mark.nightly
def test_a_stored_model_goes_on_as_it_was(tmp_path):
    x, y = noisy_data()
    # Keras does not store the states of random numbers.
    model = noisy_net(dropout=0.0)
    model.compile(keras_kfc.KFC(step="quadratic", seed=0), {"a": "mse", "b": "mse"})
    for _ in range(6):
        model.train_on_batch(x, y)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert loaded.optimizer.step == "quadratic"
    assert float(loaded.optimizer.damping) == float(model.optimizer.damping)
    for other in (model, loaded):
        for _ in range(4):
            other.train_on_batch(x, y)
    for weight, again in zip(model.get_weights(), loaded.get_weights(), strict=True):
        np.testing.assert_allclose(again, weight, rtol=1e-5, atol=1e-6)


@pytest.mark.nightly
@pytest.mark.parametrize("options", few([{"run_eagerly": True}, {"jit_compile": True}], 1))
def test_xla_and_eager_mode_say_the_same(options):
    x, y = noisy_data()
    losses = []
    for own in ({}, options):
        # XLA draws other random numbers.
        model = noisy_net(dropout=0.0)
        optimizer = keras_kfc.KFC(step="quadratic", seed=0, fisher="exact")
        model.compile(optimizer, {"a": "mse", "b": "mse"}, **own)
        losses.append(model.fit(x, y, batch_size=32, epochs=8, shuffle=False, verbose=0))
    plain, other = (h.history["loss"] for h in losses)
    np.testing.assert_allclose(other, plain, rtol=1e-3)
    assert plain[-1] < plain[0]


@pytest.mark.slow
def test_a_loop_of_ones_own_names_the_variables():
    model, x, y = linear_problem()
    optimizer = keras_kfc.KFC(10.0, **SETTINGS)
    optimizer.build(model.trainable_variables)

    @tf.function
    def step(x, y, own):
        with (
            tf.GradientTape() as tape,
            keras_kfc.Capture(model.trainable_variables if own else ()) as capture,
        ):
            outputs = model(x, training=True)
            loss = tf.reduce_mean(tf.square(y - outputs))
        gradients = tape.gradient(loss, [v.value for v in model.trainable_variables])
        optimizer.update_factors(capture, "mse", y, outputs)
        optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
        return loss

    x, y = x.astype("float32"), y.astype("float32")
    losses = [float(step(x, y, True)) for _ in range(8)]
    best = np.linalg.lstsq(np.append(x, np.ones((50, 1)), 1), y, rcond=None)[1].sum() / y.size
    assert losses[-1] < 1.02 * best < losses[1]
    # Without them it is Polyak's step.
    assert np.isfinite(float(step(x, y, False)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"step": "newton"}, "`step`"),
        ({"step": "quadratic", "polyak_scaling": None}, "`polyak_scaling` must not be None"),
        ({"step": "quadratic", "norm_constraint": 0.1}, "`norm_constraint` must be None"),
        (
            {
                "step": "quadratic",
                "damping": keras.optimizers.schedules.ExponentialDecay(0.5, 10, 0.1),
            },
            "`damping` must be a number",
        ),
    ],
)
def test_arguments_that_do_not_go_together_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        keras_kfc.KFC(**options)


def test_several_replicas_are_refused():
    check_alone(1)
    with pytest.raises(ValueError, match=r'`step` must be "polyak".*2 replicas'):
        check_alone(2)
