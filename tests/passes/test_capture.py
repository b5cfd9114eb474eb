"""Which forward pass the factors come from, in train steps of every kind."""

import gc

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import few

import keras_kfc
from conftest import relative_error
from keras_kfc._compat.tensorflow_internals import is_recording

X = np.random.default_rng(0).normal(size=(8, 4)).astype("float32")
Y = np.random.default_rng(1).normal(size=(8, 2)).astype("float32")
EXTENDED = np.column_stack([X, np.ones(8)])
OMEGA = EXTENDED.T @ EXTENDED / 8
# Factors of the last batch alone, in the setting whose omega is the inputs' alone.
EXPAND = {"weight_sharing": "expand", "curvature_update_period": 1}
SETTINGS = {**EXPAND, "curvature_ema": 0.0}


def built(model=keras.Sequential, **compile_options):
    """A compiled model of one layer, whose omega is that of its last batch."""
    net = model([keras.Input((4,)), keras_kfc.layers.Dense(2)])
    net.compile(keras_kfc.KFC(**SETTINGS), "mse", **compile_options)
    return net


def omega_of(model):
    return model.optimizer.blocks[0].omega[0]


@pytest.mark.parametrize("run_eagerly", [True, False])
def test_an_inference_pass_inside_the_train_step_does_not_count(run_eagerly):
    class Consistent(keras.Sequential):
        def train_step(self, data):
            x, y, *_ = data
            with tf.GradientTape() as tape:
                outputs = self(x, training=True)
                tf.stop_gradient(self(100.0 * x, training=False))
                loss = self.compute_loss(x, y, outputs)
            gradients = tape.gradient(loss, self.trainable_variables)
            self.optimizer.apply(gradients, self.trainable_variables)
            return {"loss": loss}

    model = built(Consistent, run_eagerly=run_eagerly)
    model.train_on_batch(X, Y)
    assert relative_error(omega_of(model), OMEGA) < 1e-5


def test_passes_that_nobody_finished_leave_no_trace():
    """A gradient for its own sake, between the steps of a custom loop and of `fit`."""
    model = built()
    optimizer, loss = model.optimizer, keras.losses.MeanSquaredError()
    optimizer.build(model.trainable_variables)

    def look_at_gradients():
        big = tf.constant(100.0 * X)
        with tf.GradientTape() as tape:
            tape.watch(big)
            value = model.compute_loss(big, Y, model(big, training=True))
        tape.gradient(value, big)

    look_at_gradients()
    with tf.GradientTape() as tape:
        with keras_kfc.Capture() as capture:
            outputs = model(X, training=True)
        value = loss(Y, outputs)
    gradients = tape.gradient(value, model.trainable_variables)
    optimizer.update_factors(capture, loss, Y, outputs)
    optimizer.apply(gradients, model.trainable_variables)
    assert relative_error(omega_of(model), OMEGA) < 1e-5
    look_at_gradients()
    model.train_on_batch(X, Y)
    assert relative_error(omega_of(model), OMEGA) < 1e-5


def test_several_losses_before_one_step_are_told(caplog):
    class Twice(keras.Sequential):
        def train_step(self, data):
            x, y, *_ = data
            with tf.GradientTape() as tape:
                loss = self.compute_loss(x, y, self(3.0 * x, training=True))
                loss += self.compute_loss(x, y, self(x, training=True))
            gradients = tape.gradient(loss, self.trainable_variables)
            self.optimizer.apply(gradients, self.trainable_variables)
            return {"loss": loss}

    model = built(Twice)
    model.train_on_batch(X, Y)
    assert "computed its loss more than once" in caplog.text
    assert relative_error(omega_of(model), OMEGA) < 1e-5


def test_a_layer_called_by_hand_changes_nothing():
    model = built()
    model.layers[0].call(tf.ones((2, 4)))
    model.train_on_batch(X, Y)
    assert relative_error(omega_of(model), OMEGA) < 1e-5


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("capture", (None, "mse", Y, Y)),
        ("loss", (keras_kfc.Capture(), None, Y, Y)),
        ("y_pred", (keras_kfc.Capture(), "mse", Y, None)),
    ],
)
def test_bad_arguments_of_update_factors_are_refused_by_name(name, arguments):
    model = built()
    model.optimizer.build(model.trainable_variables)
    with pytest.raises((TypeError, ValueError), match=f"`{name}`"):
        model.optimizer.update_factors(*arguments)


@pytest.mark.slow
@pytest.mark.parametrize("run_eagerly", few([False, True], 1))
def test_a_train_step_that_calls_parts_of_the_model_gets_the_empirical_fisher(run_eagerly, caplog):
    class Wrapper(keras.Model):
        def __init__(self):
            super().__init__()
            self.encoder = keras.Sequential([keras.Input((4,)), keras_kfc.layers.Dense(3, "tanh")])
            self.decoder = keras.Sequential([keras.Input((3,)), keras_kfc.layers.Dense(2)])

        def call(self, inputs):
            return self.decoder(self.encoder(inputs))

        def train_step(self, data):
            x, y, *_ = data
            with tf.GradientTape() as tape:
                outputs = self.decoder(self.encoder(x, training=True), training=True)
                loss = tf.reduce_mean(tf.square(y - outputs))
            gradients = tape.gradient(loss, self.trainable_variables)
            self.optimizer.apply(gradients, self.trainable_variables)
            return {"loss": loss}

    model = Wrapper()
    model(X)
    model.compile(keras_kfc.KFC(**EXPAND), "mse", run_eagerly=run_eagerly)
    before = model.evaluate(X, Y, verbose=0)
    model.fit(X, Y, batch_size=8, epochs=30, verbose=0)
    assert len([r for r in caplog.records if "empirical" in r.getMessage()]) == 1
    assert len(model.optimizer.blocks) == 2
    assert model.evaluate(X, Y, verbose=0) < 0.7 * before
    assert relative_error(model.optimizer.blocks[0].omega[0], OMEGA) < 1e-5
    # Gamma of the last layer, by hand: derivatives of one example's loss.
    residuals = 2 * (model(X).numpy() - Y) / 2
    fresh = Wrapper()
    fresh(X)
    fresh.set_weights(model.get_weights())
    fresh.compile(keras_kfc.KFC(0.0, **SETTINGS), "mse", run_eagerly=run_eagerly)
    fresh.fit(X, Y, batch_size=8, epochs=2, verbose=0)
    gamma = fresh.optimizer.blocks[1].gamma[0]
    assert relative_error(gamma, residuals.T @ residuals / 8) < 1e-5


def test_a_pass_that_broke_off_leaves_nothing_to_record_evaluations():
    """Its capture stays open, and its tape would go on when model and optimizer are gone."""

    class Breaks(keras.layers.Layer):
        is_due = False

        def call(self, inputs):
            if self.is_due:
                raise ArithmeticError
            return inputs

    broken = keras.Sequential([keras.Input((4,)), keras_kfc.layers.Dense(2), Breaks()])
    broken.compile(keras_kfc.KFC(), "mse", run_eagerly=True)
    broken.optimizer.build(broken.trainable_variables)
    broken.layers[-1].is_due = True
    with pytest.raises(ArithmeticError):
        broken.train_on_batch(X, Y)
    assert len(broken.optimizer.automatic_captures.by_replica) == 1
    del broken
    keras.backend.clear_session()
    gc.collect()
    model = built()
    model.evaluate(X, Y, verbose=0)
    assert not model.optimizer.automatic_captures.by_replica
    assert not is_recording()


def test_the_first_step_of_a_loop_without_capture_moves_along_the_gradient():
    """Nothing could be recorded for an optimizer that is built only now; the next step is KFC's."""
    model = keras.Sequential([keras.Input((4,)), keras_kfc.layers.Dense(2)])
    optimizer = keras_kfc.KFC(0.01, momentum=0.0, polyak_scaling=None, weight_decay=None)

    def step():
        before = [v.numpy() for v in model.trainable_variables]
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(model(X, training=True) - Y))
        gradients = tape.gradient(loss, model.trainable_variables)
        optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
        moves = [v.numpy() - b for v, b in zip(model.trainable_variables, before, strict=True)]
        return moves, gradients

    for move, gradient in zip(*step(), strict=True):
        np.testing.assert_allclose(move, -0.01 * gradient.numpy(), rtol=1e-4)
    moves, gradients = step()
    assert np.abs(moves[0] + 0.01 * gradients[0].numpy()).max() > 1e-4
    assert float(optimizer.blocks[0].ema_weight) > 0


def dense_after_dropout(where):
    """Two Dense layers with an idle Dropout before one of them, at some depth."""
    first, second = keras_kfc.layers.Dense(3, "tanh"), keras_kfc.layers.Dense(2)
    idle = keras.layers.Dropout(0.5)
    if where == "first":
        return [keras.Input((4,)), idle, first, second]
    if where == "between":
        return [keras.Input((4,)), first, idle, second]
    inner = keras.Sequential([keras.Input((4,)), first, keras.Sequential([idle, second])])
    return [keras.Input((4,)), keras.Sequential([idle]), inner]


@pytest.mark.parametrize(
    ("where", "run_eagerly"),
    few([("first", True), ("between", True), ("between", False), ("nested", True)], 2),
)
@pytest.mark.parametrize("arguments", [{}, {"training": False}], ids=["untold", "inference"])
def test_a_train_step_that_does_not_say_that_it_trains(where, run_eagerly, arguments, caplog):
    """Dropout's `training=False` is then passed on to all layers behind it."""

    class Untold(keras.Sequential):
        def train_step(self, data):
            x, y, *_ = data
            with tf.GradientTape() as tape:
                loss = self.compute_loss(x, y, self(x, **arguments))
            gradients = tape.gradient(loss, self.trainable_variables)
            self.optimizer.apply(gradients, self.trainable_variables)
            return {"loss": loss}

    model = Untold(dense_after_dropout(where))
    model.compile(
        keras_kfc.KFC(0.0, fisher="exact", **SETTINGS),
        "mse",
        run_eagerly=run_eagerly,
    )
    model.fit(X, Y, batch_size=8, epochs=2, verbose=0)
    kernel, bias, out_kernel, _ = (w.astype("float64") for w in model.get_weights())
    hidden = np.tanh(X @ kernel + bias)
    extended = np.column_stack([hidden, np.ones(8)])
    first, second = model.optimizer.blocks
    assert relative_error(first.omega[0], OMEGA) < 1e-5
    assert relative_error(second.omega[0], extended.T @ extended / 8) < 1e-5
    # The Gauss-Newton matrix of a mean of squares of two outputs is the identity.
    assert relative_error(second.gamma[0], np.eye(2)) < 1e-5
    backs = [np.diag(1 - h**2) @ out_kernel for h in hidden]
    assert relative_error(first.gamma[0], sum(b @ b.T for b in backs) / 8) < 1e-4
    assert not [r for r in caplog.records if r.name == "keras_kfc"]


@pytest.mark.parametrize("run_eagerly", [True, False])
def test_what_the_loss_does_not_depend_on_does_not_count(run_eagerly):
    """A pass for another purpose, inside the tape and before the one that is trained."""

    class Teaching(keras.Sequential):
        def train_step(self, data):
            x, y, *_ = data
            with tf.GradientTape() as tape:
                tf.stop_gradient(self(100.0 * x, training=True))
                loss = self.compute_loss(x, y, self(x, training=True))
            gradients = tape.gradient(loss, self.trainable_variables)
            self.optimizer.apply(gradients, self.trainable_variables)
            return {"loss": loss}

    model = built(Teaching, run_eagerly=run_eagerly)
    model.train_on_batch(X, Y)
    assert relative_error(omega_of(model), OMEGA) < 1e-5


@pytest.mark.parametrize("eager", [True, False])
def test_a_gradient_for_something_else_does_not_count(eager):
    """The gradient of another loss with regard to the inputs, of the same forward pass."""
    model = keras.Sequential([keras.Input((4,)), keras_kfc.layers.Dense(2)])
    optimizer = keras_kfc.KFC(0.0, **SETTINGS)
    optimizer.build(model.trainable_variables)

    def step(x):
        with tf.GradientTape(persistent=True) as tape:
            tape.watch(x)
            outputs = model(x)
            other = 100.0 * tf.reduce_sum(outputs)
            loss = tf.reduce_mean(tf.reduce_sum(tf.square(outputs - Y), axis=1))
        tape.gradient(other, x)
        gradients = tape.gradient(loss, model.trainable_variables)
        optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))

    (step if eager else tf.function(step))(tf.constant(X))
    kernel, bias = (w.astype("float64") for w in model.get_weights())
    derivatives = 2 * (X @ kernel + bias - Y)
    assert relative_error(optimizer.blocks[0].gamma[0], derivatives.T @ derivatives / 8) < 1e-4
