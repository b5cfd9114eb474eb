"""Layers whose statistics cannot be had train by the fallback rule, as if excluded before."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import few
from nets import conv_net, flat_weights, image_batch

import keras_kfc
from conftest import relative_error

POINTS = tf.constant(np.linspace(-3, 2, 64)[:, None].astype("float32"))


def messages(caplog):
    return [r.getMessage() for r in caplog.records if r.name == "keras_kfc"]


def field():
    """A plain network of one input and one output."""
    keras.utils.set_random_seed(1)
    dense = keras.layers.Dense
    return keras.Sequential([keras.Input((1,)), dense(32, "tanh"), dense(32, "tanh"), dense(1)])


def solve(model, optimizer, steps, eager=False):
    """Trains a network to solve u'' = -sin x with u = sin x at both ends; returns its loss."""

    def step():
        with tf.GradientTape() as tape:
            with tf.GradientTape() as outer:
                outer.watch(POINTS)
                with tf.GradientTape() as inner:
                    inner.watch(POINTS)
                    values = model(POINTS)
                slope = inner.gradient(values, POINTS)
            residual = outer.gradient(slope, POINTS) + tf.sin(POINTS)
            ends = [model(end) - tf.sin(end) for end in (POINTS[:1], POINTS[-1:])]
            loss = sum(tf.reduce_mean(tf.square(part)) for part in (residual, *ends))
        gradients = tape.gradient(loss, model.trainable_variables)
        optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
        return loss

    step = step if eager else tf.function(step)
    return float(np.mean([float(step()) for _ in range(steps)][-20:]))


@pytest.mark.slow
@pytest.mark.parametrize("built", few([False, True], 1))
def test_a_differential_equation_is_solved_as_well_as_by_adam(built, caplog):
    model, optimizer = keras_kfc.instrument(field()), keras_kfc.KFC(seed=1)
    if built:
        optimizer.build(model.trainable_variables)
    loss = solve(model, optimizer, 400)
    assert loss < 2 * solve(field(), keras.optimizers.Adam(3e-3), 400)
    (message,) = messages(caplog)
    assert "differentiated again" in message
    assert all(layer.path in message for layer in model.layers)
    assert not optimizer.blocks and int(optimizer.iterations) == 400
    excluded = field()
    keras_kfc.instrument(excluded, exclude=[layer.name for layer in excluded.layers])
    solve(excluded, keras_kfc.KFC(seed=1), 400)
    assert relative_error(flat_weights(model), flat_weights(excluded)) < 1e-6


def test_a_differential_equation_in_eager_mode():
    model, optimizer = keras_kfc.instrument(field()), keras_kfc.KFC(seed=1)
    optimizer.build(model.trainable_variables)
    solve(model, optimizer, 3, eager=True)
    excluded = field()
    keras_kfc.instrument(excluded, exclude=[layer.name for layer in excluded.layers])
    solve(excluded, keras_kfc.KFC(seed=1), 3, eager=True)
    assert relative_error(flat_weights(model), flat_weights(excluded)) < 1e-6


@keras.saving.register_keras_serializable("test_left_out")
class Penalised(keras.Model):
    """Two networks side by side; the gradient of the first one is penalised."""

    def __init__(self, instrumented=True, **kwargs):
        super().__init__(**kwargs)
        self.instrumented = instrumented
        dense = keras_kfc.layers.Dense if instrumented else keras.layers.Dense
        self.smooth = [dense(4, "tanh", name="in"), dense(2, name="out")]
        self.free = dense(2, name="free")

    def build(self, shape):
        """Builds all layers."""
        self.smooth[0].build(shape)
        self.smooth[1].build((None, 4))
        self.free.build(shape)

    def get_config(self):
        """Whether layers are those of the package."""
        return {**super().get_config(), "instrumented": self.instrumented}

    def call(self, x):
        """Both networks' outputs."""
        return self.smooth[1](self.smooth[0](x)), self.free(x)

    def train_step(self, data):
        """Squares of the outputs' errors, and of the first one's slope."""
        x, y = data
        with tf.GradientTape() as tape:
            with tf.GradientTape() as inner:
                inner.watch(x)
                smooth, free = self(x, training=True)
            slope = inner.gradient(smooth, x)
            loss = sum(tf.reduce_mean(tf.square(part)) for part in (smooth - y, free - y, slope))
        gradients = tape.gradient(loss, self.trainable_variables)
        self.optimizer.apply(gradients, self.trainable_variables)
        return {"loss": loss}


def penalised(instrumented=True, **options):
    keras.utils.set_random_seed(1)
    model = Penalised(instrumented)
    model.build((None, 3))
    keras_kfc.instrument(model)
    model.compile(keras_kfc.KFC(seed=1, curvature_update_period=2), **options)
    return model


def fit(model, epochs):
    rng = np.random.default_rng(0)
    x, y = (rng.normal(size=(16, n)).astype("float32") for n in (3, 2))
    model.fit(x, y, batch_size=8, epochs=epochs, shuffle=False, verbose=0)
    return flat_weights(model)


@pytest.mark.nightly
@pytest.mark.parametrize("run_eagerly", few([True, False], 1))
def test_layers_with_a_gradient_penalty_leave_the_others_their_blocks(run_eagerly, caplog):
    model = penalised(run_eagerly=run_eagerly)
    fit(model, 2)
    assert [block.path.split("/")[-1] for block in model.optimizer.blocks] == ["free"]
    assert float(model.optimizer.blocks[0].ema_weight) > 0
    assert len([m for m in messages(caplog) if "differentiated again" in m]) == 1
    excluded = penalised(run_eagerly=run_eagerly)
    keras_kfc.instrument(excluded, exclude=["in", "out"])
    fit(excluded, 2)
    assert relative_error(flat_weights(model), flat_weights(excluded)) < 1e-6


@pytest.mark.nightly
@pytest.mark.filterwarnings("ignore:The stored state of optimizer")
@pytest.mark.parametrize("instrumented", [True, pytest.param(False, marks=pytest.mark.nightly)])
def test_a_resumed_run_equals_an_uninterrupted_one(instrumented, tmp_path, caplog):
    expected = fit(penalised(instrumented), 4)
    model = penalised(instrumented)
    fit(model, 2)
    model.save(tmp_path / "model.keras")
    keras.backend.clear_session(free_memory=False)
    model = keras_kfc.instrument(keras.models.load_model(tmp_path / "model.keras"))
    assert len(model.optimizer.blocks) == 1
    caplog.clear()
    assert relative_error(fit(model, 2), expected) < 1e-6
    assert not [m for m in messages(caplog) if "differentiated again" in m]
    # Nothing to be changed by instrumenting it once more.
    keras_kfc.instrument(model)
    assert not [m for m in messages(caplog) if "built before" in m]


@pytest.mark.slow
def test_blocks_that_have_statistics_stay(caplog):
    """A penalty that comes in later, when steps have been taken with the layers' blocks."""
    model = keras.Sequential([keras.Input((3,)), keras_kfc.layers.Dense(2)])
    model.compile(keras_kfc.KFC(seed=1), "mse")
    x = tf.constant(np.random.default_rng(0).normal(size=(8, 3)).astype("float32"))
    model.train_on_batch(x, x[:, :2])

    @tf.function
    def step():
        with tf.GradientTape() as tape:
            with tf.GradientTape() as inner:
                inner.watch(x)
                outputs = tf.square(model(x, training=True))
            loss = tf.reduce_mean(tf.square(inner.gradient(outputs, x)))
        gradients = tape.gradient(loss, model.trainable_variables)
        model.optimizer.apply(gradients, model.trainable_variables)

    before = flat_weights(model)
    for _ in range(3):
        step()
    assert len(model.optimizer.blocks) == 1
    assert len([m for m in messages(caplog) if "has begun to" in m]) == 1
    after = flat_weights(model)
    assert np.isfinite(after).all() and relative_error(after, before) > 0


@pytest.mark.parametrize("eager", few([True, False], 1))
def test_gradients_without_statistics_train_by_the_fallback_rule(eager, caplog):
    results = []
    for layers in (keras_kfc.layers, keras.layers):
        model, optimizer = conv_net(layers), keras_kfc.KFC(seed=1)
        optimizer.build(model.trainable_variables)

        def step(optimizer=optimizer, model=model):
            variables = model.trainable_variables
            optimizer.apply([tf.ones(v.shape) for v in variables], variables)

        step = step if eager else tf.function(step)
        for _ in range(3):
            step()
        results.append(flat_weights(model))
    assert relative_error(*results) < 1e-6
    told = [m for m in messages(caplog) if "no inputs and derivatives" in m]
    assert len(told) == 1 and "conv" in told[0] and "dense" in told[0]


@pytest.mark.nightly
def test_a_layer_that_only_a_regularizer_reaches_trains():
    class WithSpare(keras.Model):
        def __init__(self):
            super().__init__()
            self.used = keras_kfc.layers.Dense(2)
            self.spare = keras_kfc.layers.Dense(2, kernel_regularizer="l2", use_bias=False)
            self.spare.build((None, 3))

        def call(self, inputs):
            return self.used(inputs)

    model = WithSpare()
    model.compile(keras_kfc.KFC(seed=1, weight_decay=None), "mse")
    x = np.random.default_rng(0).normal(size=(16, 3)).astype("float32")
    model(x)
    before = np.linalg.norm(model.spare.get_weights()[0])
    model.fit(x, x[:, :2], batch_size=16, epochs=5, verbose=0)
    assert np.linalg.norm(model.spare.get_weights()[0]) < before
    assert len(model.optimizer.blocks) == 1


@pytest.mark.slow
def test_a_layer_outside_of_the_users_capture_steps_along_the_gradient(caplog):
    """The other's factors are updated before: too late to give up blocks in a graph."""
    model = conv_net(batch_norm=False)
    optimizer = keras_kfc.KFC(0.01, momentum=0.0, polyak_scaling=None, weight_decay=None, seed=1)
    optimizer.build(model.trainable_variables)
    images, labels = image_batch()
    loss_fn = keras.losses.SparseCategoricalCrossentropy()

    @tf.function
    def step():
        with tf.GradientTape() as tape:
            hidden = model.layers[0](images)
            with keras_kfc.Capture() as capture:
                outputs = hidden
                for layer in model.layers[1:]:
                    outputs = layer(outputs)
            loss = loss_fn(labels, outputs)
        optimizer.update_factors(capture, loss_fn, labels, outputs)
        gradients = tape.gradient(loss, model.trainable_variables)
        optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
        return gradients[0]

    before = model.layers[0].get_weights()[0]
    gradient = step().numpy()
    np.testing.assert_allclose(
        model.layers[0].get_weights()[0] - before, -0.01 * gradient, 1e-3, 1e-7
    )
    step()
    assert len([m for m in messages(caplog) if "has begun to" in m]) == 1
