"""`model.fit` with KFC: ways to train that must agree, scale freedom, periods."""

import logging

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import squared_fisher_norm
from nets import conv_net, conv_stack, flat_weights, image_batch, train

import keras_kfc
from conftest import relative_error
from keras_kfc.optimizer.schedule import growing_periods


def kfc(**kwargs):
    """An optimizer whose factors and inverses are due often and whose draws repeat."""
    defaults = {"seed": 3, "curvature_update_period": 2, "inverse_update_period": 3}
    return keras_kfc.KFC(**{**defaults, **kwargs})


@pytest.fixture
def reference():
    """Weights after training a plain Sequential of capturing layers in graph mode."""
    return train(conv_net(), kfc())


def test_training_learns():
    model = conv_net()
    before = flat_weights(model)
    after = train(model, kfc(), steps=25)
    images, labels = image_batch()
    assert relative_error(after, before) > 0.01
    assert model.evaluate(images, labels, verbose=0) < 0.2


@pytest.mark.slow
def test_xla_trains_as_graph_mode_does():
    """With the exact Fisher, because TensorFlow's random numbers differ under XLA."""
    plain, compiled = (
        train(conv_net(), kfc(fisher="exact"), jit_compile=jit_compile)
        for jit_compile in (False, True)
    )
    assert relative_error(compiled, plain) < 1e-4


@pytest.mark.nightly
def test_models_built_in_any_way_train_alike(reference):
    # The reference has a batch normalisation of Keras's own.
    instrumented = keras_kfc.instrument(conv_net(keras.layers), exclude=["norm"])
    assert relative_error(train(instrumented, kfc()), reference) < 1e-6
    stack = conv_stack()
    outputs = stack[0]
    inputs = outputs
    for layer in stack[1:]:
        outputs = layer(outputs)
    functional = keras.Model(inputs, outputs)
    assert type(functional).__name__ == "Functional"
    assert relative_error(train(functional, kfc()), reference) < 1e-6


class Subclassed(keras.Model):
    """A subclassed model without a `training` argument."""

    def __init__(self):
        super().__init__()
        self.stack = conv_stack(batch_norm=False)[1:]

    def call(self, inputs):
        """Runs the stack."""
        for layer in self.stack:
            inputs = layer(inputs)
        return inputs


@pytest.mark.nightly
def test_subclassed_models_without_training_argument():
    class WithArgument(Subclassed):
        def call(self, inputs, training=None):
            return super().call(inputs)

    first, second = Subclassed(), WithArgument()
    assert relative_error(train(first, kfc()), train(second, kfc())) < 1e-6


def test_custom_train_step_that_calls_compute_loss_gets_the_sampled_fisher(reference, caplog):
    class Custom(keras.Sequential):
        def train_step(self, data):
            x, y = data
            with tf.GradientTape() as tape:
                loss = self.compute_loss(x, y, self(x, training=True))
            gradients = tape.gradient(loss, self.trainable_variables)
            self.optimizer.apply(gradients, self.trainable_variables)
            return {"loss": loss}

    assert relative_error(train(conv_net(model=Custom), kfc()), reference) < 1e-6
    # Nothing of an empirical Fisher matrix: only that the norm is Keras's own layer.
    (record,) = caplog.records
    assert "/norm. Call `keras_kfc.instrument" in record.getMessage()


@pytest.mark.slow
def test_custom_train_step_with_a_loss_of_its_own_gets_the_empirical_fisher(caplog):
    class Custom(keras.Sequential):
        def train_step(self, data):
            x, y = data
            with tf.GradientTape() as tape:
                outputs = self(x, training=True)
                loss = tf.reduce_mean(keras.losses.sparse_categorical_crossentropy(y, outputs))
            gradients = tape.gradient(loss, self.trainable_variables)
            self.optimizer.apply(gradients, self.trainable_variables)
            return {"loss": loss}

    first, model = conv_net(), conv_net(model=Custom)
    with caplog.at_level(logging.WARNING, "keras_kfc"):
        train(model, kfc(), steps=3)
    assert len([r for r in caplog.records if "empirical" in r.getMessage()]) == 1
    train(first, kfc(fisher="empirical"), steps=1)
    train(model := conv_net(model=Custom), kfc(), steps=1)
    for block, expected in zip(model.optimizer.blocks, first.optimizer.blocks, strict=True):
        assert relative_error(block.gamma, expected.gamma) < 1e-4


@pytest.mark.slow
def test_custom_loop_equals_fit(reference):
    model, optimizer = conv_net(), kfc()
    loss_fn = keras.losses.SparseCategoricalCrossentropy()
    optimizer.build(model.trainable_variables)

    @tf.function
    def step(images, labels):
        with tf.GradientTape() as tape, keras_kfc.Capture() as capture:
            outputs = model(images, training=True)
            loss = loss_fn(labels, outputs)
        optimizer.update_factors(capture, loss_fn, labels, outputs)
        gradients = tape.gradient(loss, model.trainable_variables)
        optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))

    images, labels = image_batch()
    for _ in range(6):
        step(images, labels)
    assert relative_error(flat_weights(model), reference) < 1e-5


def test_update_factors_before_build_is_refused_with_advice():
    with pytest.raises(ValueError, match=r"optimizer\.build"):
        kfc().update_factors(keras_kfc.Capture(), "mse", tf.ones((1, 1)), tf.ones((1, 1)))


@pytest.mark.nightly
def test_a_constant_factor_on_the_loss_changes_nothing():
    """Includes the fallback rule for the batch norm; float64 leaves nothing to tolerance."""
    keras.config.set_floatx("float64")
    data = image_batch(dtype="float64")

    def trained(factor, **options):
        return train(conv_net(), kfc(**options), steps=12, data=data, loss_weights=factor)

    reference = trained(1.0)
    for factor in (1e-3, 1e3):
        assert relative_error(trained(factor), reference) < 1e-5
    absolute = {"relative_damping": False, "damping": 1e-2}
    # Negative control.
    assert relative_error(trained(1.0, **absolute), trained(1e3, **absolute)) > 1e-3


def test_only_due_steps_change_factors_and_inverses():
    model, optimizer = conv_net(), keras_kfc.KFC(curvature_update_period=3, inverse_update_period=6)
    model.compile(optimizer=optimizer, loss="sparse_categorical_crossentropy")
    due: dict[str, list[int]] = {"gamma": [], "gamma_inverse": []}
    previous = dict.fromkeys(due, 0.0)
    for step in range(31):
        model.train_on_batch(*image_batch(seed=step))
        for name, steps in due.items():
            now = getattr(optimizer.blocks[0], name).numpy()
            if np.any(now != previous[name]):
                steps.append(step)
            previous[name] = now
    # Every step, every second one, then the periods; inverses are always of new factors.
    start = [*range(8), 8, 10, 12]
    assert due == {
        "gamma": [*start, 15, 18, 21, 24, 27, 30],
        "gamma_inverse": [*start, 15, 18, 21, 24, 30],
    }


def test_gaps_between_updates_grow_to_the_period():
    assert growing_periods(10, 10) == [1, 2, 4, 8, 10]
    assert growing_periods(20, 10) == [1, 2, 4, 8, 10, 20]
    assert growing_periods(100, 10) == [1, 2, 4, 8, 10, 20, 40, 80, 100]
    assert growing_periods(1, 10) == growing_periods(1, 1) == [1]
    assert growing_periods(4, 1) == [1, 2, 4]
    assert growing_periods(5, 7) == [1, 2, 4, 5]


@pytest.mark.slow
def test_first_estimate_is_the_first_batch():
    """No initial value leaks into the moving average, which is bias-corrected."""
    model, optimizer = (
        conv_net(),
        kfc(curvature_update_period=1, fisher="exact", learning_rate=1e-9),
    )
    model.compile(optimizer=optimizer, loss="sparse_categorical_crossentropy")
    batches = [image_batch(seed=seed) for seed in range(3)]
    omegas = []
    for images, labels in batches:
        model.train_on_batch(images, labels)
        factors = keras_kfc.kronecker_factors(model, images, labels, fisher="exact")
        omegas.append(next(iter(factors.values())).omega)
        weights = 0.95 ** np.arange(len(omegas))[::-1]
        expected = np.tensordot(weights / weights.sum(), omegas, 1)
        assert relative_error(optimizer.blocks[0].omega[0], expected) < 1e-5


@pytest.mark.slow
def test_learning_rate_and_damping_are_read_and_set_during_training():
    schedule = keras.optimizers.schedules.PiecewiseConstantDecay([2], [0.5, 0.25])
    model, optimizer = conv_net(), kfc(learning_rate=schedule, damping=schedule)
    train(model, optimizer, steps=2)
    assert float(optimizer.learning_rate) == float(optimizer.damping) == 0.5
    train_more = {"epochs": 2, "verbose": 0, "batch_size": 32}
    model.fit(*image_batch(), **train_more)
    assert float(optimizer.learning_rate) == float(optimizer.damping) == 0.25
    with pytest.raises(TypeError, match="damping is not settable"):
        optimizer.damping = 0.1

    model, optimizer = conv_net(), kfc(momentum=0.0, adam_lr_ratio=0.0)
    train(model, optimizer, steps=1)
    size = []
    state = [*model.variables, *optimizer.variables]
    start = [variable.numpy() for variable in state]
    for polyak in (0.1, 0.05):
        for variable, value in zip(state, start, strict=True):
            variable.assign(value)
        optimizer.polyak_scaling = polyak
        before = model.layers[0].get_weights()
        model.fit(*image_batch(), batch_size=32, verbose=0)
        size.append(relative_error(model.layers[0].get_weights()[0], before[0]))
    assert size[1] / size[0] == pytest.approx(0.5, rel=1e-2)

    model, optimizer = conv_net(), kfc(polyak_scaling=None)
    train(model, optimizer, steps=1)
    optimizer.learning_rate = 0.0
    before = model.layers[0].get_weights()
    optimizer.momentum = 0.0
    optimizer.parts.momentums[0].assign(tf.zeros_like(optimizer.parts.momentums[0]))
    optimizer.parts.momentums[1].assign(tf.zeros_like(optimizer.parts.momentums[1]))
    model.fit(*image_batch(), batch_size=32, verbose=0)
    for old, new in zip(before, model.layers[0].get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)
    inverse = optimizer.blocks[0].gamma_inverse.numpy()
    optimizer.damping = 1e6
    assert float(optimizer.damping) == 1e6
    model.fit(*image_batch(), epochs=3, **{"batch_size": 32, "verbose": 0})
    assert np.abs(optimizer.blocks[0].gamma_inverse.numpy()).max() < 1e-2 * np.abs(inverse).max()


@pytest.mark.nightly
def test_trust_region_bounds_the_quadratic_form():
    """One step from rest: the update's squared Fisher norm is `norm_constraint` times the loss."""
    images, labels = image_batch()
    for norm_constraint in (1e-6, 1e-4):
        model = conv_net(batch_norm=False)
        settings = {"nesterov": False, "damping": 1e-3, "weight_decay": None}
        optimizer = kfc(
            polyak_scaling=None, norm_constraint=norm_constraint, learning_rate=10.0, **settings
        )
        model.compile(optimizer=optimizer, loss="sparse_categorical_crossentropy")
        loss = model.evaluate(images, labels, verbose=0)
        before = {layer.name: layer.get_weights() for layer in model.layers}
        model.train_on_batch(images, labels)
        total = 0.0
        for block in optimizer.blocks:
            name = block.path.split("/")[-1]
            new = model.get_layer(name).get_weights()
            step = [a - b for a, b in zip(new, before[name], strict=True)]
            total += squared_fisher_norm(block, step)
        assert abs(total / (norm_constraint * loss) - 1) < 0.02
