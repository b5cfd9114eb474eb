"""The recursions of step size, momentum and fallback rule against naive NumPy ones."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import few

import keras_kfc
from conftest import relative_error


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize(
    ("norm_constraint", "polyak_scaling"), few([(None, 0.01), (1e-3, None), (None, None)], 1)
)
def test_step_follows_the_recursion_of_the_docstring(nesterov, norm_constraint, polyak_scaling):
    keras.config.set_floatx("float64")
    rng = np.random.default_rng(0)
    # So few examples that gradients are mostly noise.
    batches = [(rng.normal(size=(4, 4)), rng.normal(size=(4, 3))) for _ in range(5)]
    model = keras.Sequential([keras.Input((4,)), keras_kfc.layers.Dense(3)])
    options = {
        "nesterov": nesterov,
        "norm_constraint": norm_constraint,
        "polyak_scaling": polyak_scaling,
        "relative_damping": False,
    }
    learning_rate, momentum, decay = 0.3, 0.7, 0.4
    optimizer = keras_kfc.KFC(
        learning_rate, 1e-3, momentum, fisher="exact", weight_decay=decay, **options
    )
    model.compile(optimizer, "mse")
    weights = np.vstack([*model.get_weights()[0:1], model.get_weights()[1][None]])
    velocity = np.zeros_like(weights)
    losses, noises, ratio, kept_parts = [], [], None, []
    for x, y in batches:
        extended = np.column_stack([x, np.ones(len(x))])
        losses.append(np.mean((extended @ weights - y) ** 2))
        model.train_on_batch(x, y)
        block = model.optimizer.blocks[0]
        # The gradient of the mean squared error of a linear model, by hand.
        gradient = 2 * extended.T @ (extended @ weights - y) / y.size
        direction = block.omega_inverse.numpy()[0] @ gradient @ block.gamma_inverse.numpy()[0]
        scale, kept = learning_rate, momentum
        if norm_constraint is not None:
            quadratic = learning_rate**2 * np.sum(direction * gradient)
            scale *= min(1.0, np.sqrt(norm_constraint / quadratic))
            assert scale < learning_rate
        # The moving average of the loss, corrected for its start.
        average = np.average(losses, weights=0.9 ** np.arange(len(losses))[::-1])
        noises.append(1 - min(1.0, 2 * average / np.sum(direction * gradient)))
        if polyak_scaling is not None:
            quotient = np.sum(direction * gradient) / average
            # The average of the steps before, which forgets its first values soon.
            ratio = quotient if ratio is None else ratio
            scale = polyak_scaling * (1 - momentum) / ratio
            moved = ratio + max(0.05, 5 / (len(losses) + 4)) * (quotient - ratio)
            # Momentum is as long as steps are now.
            kept, ratio = min(momentum * ratio / moved, 1 - (1 - momentum) / 1.8), moved
            kept_parts.append(kept / momentum)
            bound = learning_rate * (1 - momentum) / np.sqrt(np.mean(direction**2))
            assert scale < bound
        step = -scale * direction
        velocity = kept * velocity + step
        share = noises[-1] * scale / (1 - momentum)
        if polyak_scaling is not None:
            share = min(share, polyak_scaling / 8)
        weights[:4] -= decay * share * weights[:4]
        weights += kept * velocity + step if nesterov else velocity
        # The size of the step is computed in float32.
        np.testing.assert_allclose(
            np.vstack([model.get_weights()[0], model.get_weights()[1][None]]),
            weights,
            rtol=1e-5,
            atol=1e-7,
        )
    assert min(noises) == 0.0 and max(noises) > 0.3
    if polyak_scaling is not None:
        assert min(kept_parts[1:]) < 0.95 and kept_parts[0] == 1.0


@pytest.mark.parametrize("decay", few([0.02, None], 1))
@pytest.mark.slow
def test_decay_leaves_alone_what_can_be_fitted_exactly(decay):
    """A regression without noise stays at its solution, also along inputs that hardly vary.

    Gradients vanish there, so that rates have no bound but that of the decay: without it, or
    where gradients count as noise, weights are off by 0.33 and 0.06 at one time or another.
    """
    keras.config.set_floatx("float64")
    rng = np.random.default_rng(4)
    x, solution = rng.normal(size=(64, 3)) * [1, 1, 0.1], rng.normal(size=(4, 2))
    solution[3] += 4
    model = keras.Sequential([keras.Input((3,)), keras_kfc.layers.Dense(2)])
    model.compile(keras_kfc.KFC(weight_decay=decay, seed=3), "mse")
    # A batch is all of the data.
    batches = tf.data.Dataset.from_tensors((x, x @ solution[:3] + solution[3])).repeat(100)
    for hundred in range(15):
        model.fit(batches, verbose=0)
        weights = np.vstack([model.get_weights()[0], model.get_weights()[1][None]])
        if hundred >= 4:
            np.testing.assert_allclose(weights, solution, atol=2e-2)


@pytest.mark.nightly
def test_the_unit_of_a_loss_whose_lowest_value_is_not_known_changes_nothing():
    """Nor does it change how fast weights decay."""
    rng = np.random.default_rng(4)
    x, y = rng.normal(size=(64, 3)).astype("float32"), rng.normal(size=(64, 1)).astype("float32")

    def trained(unit):
        def minus_covariance(y_true, y_pred):
            return -unit * tf.reduce_mean((y_true - tf.reduce_mean(y_true)) * tf.tanh(y_pred))

        keras.utils.set_random_seed(1)
        layers = [keras_kfc.layers.Dense(8, activation="tanh"), keras_kfc.layers.Dense(1)]
        model = keras.Sequential([keras.Input((3,)), *layers])
        model.compile(keras_kfc.KFC(weight_decay=1.0, seed=3), minus_covariance)
        start = model.get_weights()
        model.fit(x, y, batch_size=32, epochs=30, shuffle=False, verbose=0)
        return start, model.get_weights()

    (start, one), (_, thousand) = trained(1.0), trained(1000.0)
    for before, some, others in zip(start, one, thousand, strict=True):
        assert relative_error(some, before) > 0.05
        np.testing.assert_allclose(others, some, rtol=2e-2, atol=2e-3)


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("soft", "momentum", "nesterov"),
    few([(True, 0.9, True), (True, 0.0, True), (True, 0.9, False), (False, 0.9, True)], 1),
)
def test_a_gradient_promises_the_loss_above_its_lowest_value(soft, momentum, nesterov):
    """What one gradient moves in all, momentum included, takes `polyak_scaling (L - L₀)` off, to
    first order.
    """
    rng = np.random.default_rng(2)
    inputs = rng.normal(size=(32, 5)).astype("float32")
    targets = rng.uniform(size=(32, 3)).astype("float32")
    if not soft:
        targets = np.round(targets)
    keras.utils.set_random_seed(1)
    model = keras.Sequential([keras.Input((5,)), keras_kfc.layers.Dense(3, activation="sigmoid")])
    optimizer = keras_kfc.KFC(
        10.0,
        damping=1e-3,
        momentum=momentum,
        nesterov=nesterov,
        polyak_scaling=0.01,
        weight_decay=None,
        seed=3,
    )
    model.compile(optimizer, "binary_crossentropy")
    p = model.predict(inputs, verbose=0).astype("float64")
    best = targets.astype("float64")
    with np.errstate(divide="ignore", invalid="ignore"):
        divergences = best * np.log(best / p) + (1 - best) * np.log((1 - best) / (1 - p))
    divergence = np.mean(
        np.where((best == 0) | (best == 1), -np.log(1 - np.abs(best - p)), divergences)
    )
    with tf.GradientTape() as tape:
        loss = model.compute_loss(y=targets, y_pred=model(inputs))
    gradients = tape.gradient(loss, model.trainable_variables)
    before = model.get_weights()
    model.train_on_batch(inputs, targets)
    for _ in range(80 if momentum else 0):
        optimizer.apply_gradients((tf.zeros_like(v), v) for v in model.trainable_variables)
    promise = -sum(
        np.sum((new - old) * gradient.numpy())
        for new, old, gradient in zip(model.get_weights(), before, gradients, strict=True)
    )
    np.testing.assert_allclose(promise, 0.01 * divergence, rtol=1e-3)


@pytest.mark.parametrize("polyak_scaling", few([0.5, 1.0], 1))
@pytest.mark.parametrize("known", [True, False])
def test_a_loss_with_no_known_lowest_value_starts_by_a_part_of_the_bound(known, polyak_scaling):
    """The same loss, as Keras's own and as a function that could be anything."""
    rng = np.random.default_rng(2)
    inputs = rng.normal(size=(32, 5)).astype("float32")
    targets = rng.normal(size=(32, 3)).astype("float32")
    keras.utils.set_random_seed(1)
    model = keras.Sequential([keras.Input((5,)), keras_kfc.layers.Dense(3)])
    optimizer = keras_kfc.KFC(
        10.0,
        momentum=0.0,
        polyak_scaling=polyak_scaling,
        fisher="empirical",
        weight_decay=None,
        seed=3,
    )

    def own(y_true, y_pred):
        return tf.reduce_mean((y_true - y_pred) ** 2, axis=-1)

    model.compile(optimizer, "mse" if known else own)
    with tf.GradientTape() as tape:
        loss = model.compute_loss(y=targets, y_pred=model(inputs))
    gradients = tape.gradient(loss, model.trainable_variables)
    before = model.get_weights()
    model.train_on_batch(inputs, targets)
    step = [new - old for new, old in zip(model.get_weights(), before, strict=True)]
    promise = -sum(np.sum(s * g.numpy()) for s, g in zip(step, gradients, strict=True))
    length = np.sqrt(np.mean(np.concatenate([part.ravel() for part in step]) ** 2))
    if known:
        np.testing.assert_allclose(promise, polyak_scaling * float(loss), rtol=1e-3)
    else:
        np.testing.assert_allclose(length, 0.2 * polyak_scaling * 10.0, rtol=1e-3)


@pytest.mark.nightly
def test_a_train_step_that_hides_its_loss_forgets_the_one_before():
    class OwnLoss(keras.Sequential):
        hides = False

        def train_step(self, data):
            if not self.hides:
                return super().train_step(data)
            x, y = data
            with tf.GradientTape() as tape:
                loss = 1e-3 * tf.reduce_mean((self(x, training=True) - y) ** 2)
            gradients = tape.gradient(loss, self.trainable_variables)
            self.optimizer.apply(gradients, self.trainable_variables)
            return {"loss": loss}

    rng = np.random.default_rng(2)
    x, y = rng.normal(size=(16, 4)).astype("f"), rng.normal(size=(16, 3)).astype("f")
    model = OwnLoss([keras.Input((4,)), keras_kfc.layers.Dense(3)])
    model.compile(keras_kfc.KFC(1e3, momentum=0.0, weight_decay=None, seed=3), "mse")
    model.fit(x, y, epochs=2, verbose=0)
    assert int(model.optimizer.progress.lowest_known) == 1
    model.hides = True
    model.make_train_function(force=True)
    before = model.get_weights()
    usual = np.sqrt(float(model.optimizer.polyak_steps._squares[0]))
    model.fit(x, y, verbose=0)
    assert int(model.optimizer.progress.lowest_known) == 0
    (block,) = model.optimizer.blocks
    extended = np.column_stack([x, np.ones(16)]).astype("float64")
    weights = np.vstack([before[0], before[1][None]])
    gradient = 1e-3 * 2 * extended.T @ (extended @ weights - y) / y.size
    direction = block.omega_inverse.numpy()[0] @ gradient @ block.gamma_inverse.numpy()[0]
    # A fifth of the bound, in units of what steps were like before.
    expected = -0.2 * 1e3 * direction / usual
    step = np.vstack([model.get_weights()[0], model.get_weights()[1][None]]) - weights
    np.testing.assert_allclose(step, expected, rtol=1e-2, atol=1e-3 * np.abs(expected).max())


def test_clipping_saves_gradients_whose_squares_overflow():
    model = keras.Sequential([keras.Input((4,)), keras_kfc.layers.Dense(3)])
    x, y = np.ones((8, 4), "f"), np.zeros((8, 3), "f")
    optimizer = keras_kfc.KFC(clipnorm=1.0, seed=3)
    model.compile(optimizer, "mse")
    model.train_on_batch(x, y)
    before = model.get_weights()
    with keras_kfc.Capture() as capture:
        outputs = model(x)
    optimizer.update_factors(capture, "mse", y, outputs)
    optimizer.apply([tf.fill(v.shape, 1e25) for v in model.trainable_variables])
    assert int(optimizer.skipped_steps) == 0
    change = model.get_weights()[0] - before[0]
    assert np.isfinite(change).all() and 0 < np.abs(change).max() < 1
