"""Nothing that a batch or a model holds may end a run or spoil the optimizer's state."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import few
from nets import compiled, conv_stack, flat_weights, image_batch

import keras_kfc
from conftest import relative_error


def state_of(optimizer):
    """Factors, inverses and momenta, with their counts.

    Not the average loss: whether a NaN in the inputs reaches the loss or stops at
    the rectifier depends on the processor.
    """
    variables = [v for v in optimizer.variables if "float" in v.dtype and "loss" not in v.name]
    return [v.numpy() for v in variables]


@pytest.fixture(scope="module")
def traced():
    """A compiled small net, and the values of its variables before any step."""
    model = compiled()
    variables = [*model.variables, *model.optimizer.variables]
    return model, [(variable, variable.numpy()) for variable in variables]


@pytest.mark.parametrize("value", few([np.nan, np.inf, -np.inf, 1e30], 3))
@pytest.mark.parametrize("first", [True, False])
def test_broken_inputs_leave_no_trace(value, first, traced):
    model, start = traced
    for variable, initial in start:
        variable.assign(initial)
    images, labels = image_batch()
    if not first:
        model.train_on_batch(images, labels)
    weights, state = flat_weights(model), state_of(model.optimizer)
    broken = images.copy()
    broken[3, 2, 2, 0] = value
    model.train_on_batch(broken, labels)
    if np.isfinite(value):
        assert np.isfinite(flat_weights(model)).all()
        assert all(np.isfinite(part).all() for part in state_of(model.optimizer))
    else:
        np.testing.assert_array_equal(flat_weights(model), weights)
        for old, new in zip(state, state_of(model.optimizer), strict=True):
            np.testing.assert_array_equal(old, new)
        assert int(model.optimizer.skipped_steps) == 1
        assert int(model.optimizer.rejected_factor_updates) == 2
    for _ in range(3):
        model.train_on_batch(images, labels)
    assert relative_error(flat_weights(model), weights) > 1e-3
    assert np.isfinite(flat_weights(model)).all()


def test_clipping_hides_no_infinity():
    variable = keras.Variable(np.ones(2, "float32"))
    optimizer = keras_kfc.KFC(clipvalue=0.5)
    optimizer.apply([tf.constant([np.inf, 1.0])], [variable])
    np.testing.assert_array_equal(variable.numpy(), 1.0)
    assert int(optimizer.skipped_steps) == 1
    optimizer.apply([tf.constant([1e30, 1.0])], [variable])
    assert (variable.numpy() < 1.0).all() and int(optimizer.skipped_steps) == 1


def test_a_skipped_step_decays_no_weights():
    def own_loss(y_true, y_pred):
        return tf.reduce_mean((y_true - y_pred) ** 2, axis=-1)

    def after_one_step(targets, weight_decay):
        keras.utils.set_random_seed(1)
        model = keras.Sequential([keras.Input((3,)), keras_kfc.layers.Dense(2)])
        compiled(
            model, own_loss, weight_decay=weight_decay, fisher="empirical", polyak_scaling=None
        )
        before = flat_weights(model)
        model.train_on_batch(np.ones((4, 3)), np.full((4, 2), targets))
        return before, flat_weights(model)

    np.testing.assert_array_equal(*after_one_step(np.nan, 50.0))
    decayed, free = (after_one_step(1.0, decay)[1] for decay in (50.0, None))
    assert relative_error(decayed, free) > 0.01


@pytest.mark.parametrize("kind", few(["int32", "bool", "sparse"], 1))
def test_dense_takes_inputs_of_any_kind(kind):
    rng = np.random.default_rng(0)
    x = rng.integers(0, 2, size=(16, 4))

    class Net(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = keras_kfc.layers.Dense(2)

        def call(self, inputs):
            return self.dense(tf.sparse.from_dense(inputs) if kind == "sparse" else inputs)

    model = compiled(Net(), "mse", weight_sharing="expand")
    model.fit(x.astype("float32" if kind == "sparse" else kind), x[:, :2], 16, verbose=0)
    expected = np.column_stack([x, np.ones(16)])
    assert relative_error(model.optimizer.blocks[0].omega[0], expected.T @ expected / 16) < 1e-5


def test_broken_targets_skip_the_step_but_not_the_factors():
    """Sampled factors do not depend on the targets."""
    model = compiled(keras.Sequential([keras.Input((3,)), keras_kfc.layers.Dense(2)]), loss="mse")
    x = np.random.default_rng(0).normal(size=(8, 3))
    model.train_on_batch(x, x[:, :2])
    weights = flat_weights(model)
    model.train_on_batch(x, np.full((8, 2), np.nan))
    np.testing.assert_array_equal(flat_weights(model), weights)
    assert int(model.optimizer.skipped_steps) == 1
    assert int(model.optimizer.rejected_factor_updates) == 0
    model.train_on_batch(x, x[:, :2])
    assert np.isfinite(flat_weights(model)).all()


def test_dead_layers_stay_finite_and_revive():
    stack = conv_stack(batch_norm=False)
    model = compiled(keras.Sequential(stack), weight_decay=None)
    images, labels = image_batch()
    stack[-1].set_weights([np.zeros_like(w) for w in stack[-1].get_weights()])
    convolution = stack[1].get_weights()[0]
    # A zero output layer sends zeros back: the convolution's gamma is zero at first.
    model.train_on_batch(images, labels)
    assert not model.optimizer.blocks[0].gamma.numpy().any()
    np.testing.assert_array_equal(stack[1].get_weights()[0], convolution)
    for _ in range(30):
        model.train_on_batch(images, labels)
    assert relative_error(stack[1].get_weights()[0], convolution) > 0.01
    assert model.evaluate(images, labels, verbose=0) < 0.3


def test_a_network_of_zeros_trains_without_an_event_it_cannot_survive():
    model = compiled()
    images, labels = np.zeros((8, 8, 8, 2)), np.zeros(8, int)
    for layer in model.layers:
        layer.set_weights([np.zeros_like(w) for w in layer.get_weights()])
    for _ in range(3):
        model.train_on_batch(images, labels)
    assert np.isfinite(flat_weights(model)).all()


def test_batches_of_any_size():
    model = compiled()
    images, labels = image_batch(21)
    model.fit(images, labels, batch_size=16, epochs=2, verbose=0)
    model.fit(images[:1], labels[:1], epochs=2, verbose=0)
    assert np.isfinite(flat_weights(model)).all()
    assert int(model.optimizer.skipped_steps) == 0


def test_last_smaller_batch_has_the_factors_of_its_own_size():
    model = compiled(fisher="exact", curvature_ema=0.0, learning_rate=1e-9, weight_sharing="expand")
    images, labels = image_batch(21)
    model.fit(images, labels, batch_size=16, shuffle=False, verbose=0)
    last = keras_kfc.kronecker_factors(model, images[16:], fisher="exact")
    for block, expected in zip(model.optimizer.blocks, last.values(), strict=True):
        assert relative_error(block.omega[0], expected.omega) < 1e-4
        assert relative_error(block.gamma[0], expected.gamma) < 1e-4


@pytest.mark.parametrize("scale", few([1e-12, 1e12], 1))
def test_inputs_of_extreme_scale(scale):
    model = compiled(keras.Sequential([keras.Input((3,)), keras_kfc.layers.Dense(2)]), loss="mse")
    x = np.random.default_rng(0).normal(size=(16, 3))
    first = model.train_on_batch(x * scale, x[:, :2])
    for _ in range(60):
        last = model.train_on_batch(x * scale, x[:, :2])
    assert np.isfinite(flat_weights(model)).all()
    assert last < first
