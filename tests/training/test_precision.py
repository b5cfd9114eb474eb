"""Dtype policies: statistics are right whatever the loss scale, and an overflow leaves no trace."""

import keras
import nets
import numpy as np
import pytest
import tensorflow as tf
from helpers import few

import keras_kfc
from conftest import naive_gamma, relative_error
from keras_kfc import KFC

LOSS = "sparse_categorical_crossentropy"


def compiled(optimizer=None, policy="float32", **kwargs):
    keras.backend.clear_session(free_memory=False)
    keras.config.set_dtype_policy(policy)
    model = nets.conv_net(batch_norm=False)
    # Other policies draw other initial weights.
    rng = np.random.default_rng(2)
    model.set_weights([0.1 * rng.normal(size=w.shape) for w in model.get_weights()])
    optimizer = KFC(fisher="exact") if optimizer is None else optimizer
    model.compile(optimizer, LOSS, **kwargs)
    nets.build_optimizer(model)
    return model


def kfc_of(model):
    return getattr(model.optimizer, "inner_optimizer", model.optimizer)


def assert_factors_equal(optimizer, expected, tolerance):
    for block, other in zip(optimizer.blocks, expected.blocks, strict=True):
        assert relative_error(block.omega, other.omega) < tolerance
        assert relative_error(block.gamma, other.gamma) < tolerance


@pytest.fixture(scope="module")
def reference():
    """After one step in float32."""
    model = compiled()
    model.train_on_batch(*nets.image_batch())
    return model


@pytest.mark.parametrize(
    ("policy", "tolerance"),
    few([("mixed_float16", 0.02), ("mixed_bfloat16", 0.02), ("float64", 1e-5)], 1),
)
def test_factors_are_those_of_float32(policy, tolerance, reference):
    model = compiled(policy=policy)
    model.train_on_batch(*nets.image_batch())
    assert_factors_equal(kfc_of(model), reference.optimizer, tolerance)
    expected = "float64" if policy == "float64" else "float32"
    for block in kfc_of(model).blocks:
        assert block.omega.dtype == block.gamma_inverse.dtype == expected


@pytest.mark.slow
def test_layers_choose_their_own_policy(reference):
    """One layer in float64 in a float32 model: its block is float64, and the factors right."""
    inputs = keras.Input((8, 8, 2))
    hidden = keras_kfc.layers.Conv2D(4, 3, strides=2, padding="same", dtype="float64")(inputs)
    hidden = keras.layers.Flatten()(keras.layers.ReLU()(hidden))
    mixed = keras.Model(inputs, keras_kfc.layers.Dense(3, activation="softmax")(hidden))
    mixed.set_weights(compiled().get_weights())
    mixed.compile(KFC(fisher="exact"), LOSS)
    mixed.train_on_batch(*nets.image_batch())
    assert [block.omega.dtype for block in mixed.optimizer.blocks] == ["float64", "float32"]
    assert_factors_equal(mixed.optimizer, reference.optimizer, 1e-4)


@pytest.mark.parametrize("initial_scale", few([2.0**12, 1.0], 1))
@pytest.mark.parametrize("fisher", few(["empirical", "exact"], 1))
def test_the_loss_scale_does_not_reach_the_factors(initial_scale, fisher):
    expected = compiled(KFC(fisher=fisher))
    expected.train_on_batch(*nets.image_batch())
    optimizer = keras.optimizers.LossScaleOptimizer(KFC(fisher=fisher), initial_scale=initial_scale)
    model = compiled(optimizer, "mixed_float16")
    model.train_on_batch(*nets.image_batch())
    assert float(model.optimizer.dynamic_scale) == initial_scale
    assert_factors_equal(kfc_of(model), expected.optimizer, 0.02)


class OwnLoss(keras.Sequential):
    """A train step that never calls the compiled loss, as plain models may have."""

    def train_step(self, data):
        x, y, _ = keras.utils.unpack_x_y_sample_weight(data)
        with tf.GradientTape() as tape:
            outputs = self(x, training=True)
            loss = tf.reduce_mean(tf.square(tf.cast(outputs, tf.float32) - y))
            scaled = self.optimizer.scale_loss(loss)
        gradients = tape.gradient(scaled, self.trainable_variables)
        self.optimizer.apply(gradients, self.trainable_variables)
        return {"loss": loss}


@pytest.mark.parametrize(
    ("policy", "scale", "tolerance"),
    few(
        [
            ("float32", None, 1e-5),
            ("mixed_float16", 2.0**12, 0.02),
            ("mixed_float16", 1.0, 0.02),
            ("mixed_bfloat16", None, 0.02),
            ("float64", None, 1e-5),
        ],
        2,
    ),
)
def test_the_ordinary_backward_pass_is_unscaled(policy, scale, tolerance):
    """The empirical Fisher matrix of a custom loss knows what the loss was multiplied by."""
    keras.config.set_dtype_policy(policy)
    model = OwnLoss([keras.Input((3,)), keras_kfc.layers.Dense(2)])
    optimizer = KFC(weight_sharing="expand")
    if scale is not None:
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer, initial_scale=scale)
    model.compile(optimizer, "mse")
    x = np.random.default_rng(0).normal(size=(16, 3)).astype("float32")
    y = 0.1 * np.random.default_rng(1).normal(size=(16, 2)).astype("float32")
    residual = model.predict(x, verbose=0).astype("float64") - y
    model.train_on_batch(x, y)
    (block,) = kfc_of(model).blocks
    # The mean over two outputs of squared residuals: derivative 2/2 of each residual.
    assert relative_error(block.gamma[0], naive_gamma(residual[:, None, :])) < tolerance


@pytest.mark.slow
def test_a_constant_loss_scale_factor_is_divided_out():
    expected, scaled = (KFC(fisher="empirical", loss_scale_factor=f) for f in (None, 2.0**10))
    for optimizer in (expected, scaled):
        model = compiled(optimizer)
        for _ in range(3):
            model.train_on_batch(*nets.image_batch())
    assert_factors_equal(scaled, expected, 1e-4)


def test_an_overflowing_step_leaves_no_trace(reference):
    optimizer = keras.optimizers.LossScaleOptimizer(KFC(fisher="exact"), initial_scale=2.0**60)
    model = compiled(optimizer, "mixed_float16")
    inner = kfc_of(model)
    optimizer.build(model.trainable_variables)
    before = [v.numpy() for v in [*model.trainable_variables, *inner.variables]]
    model.train_on_batch(*nets.image_batch())
    assert float(optimizer.dynamic_scale) == 2.0**59
    for variable, value in zip([*model.trainable_variables, *inner.variables], before, strict=True):
        np.testing.assert_array_equal(variable.numpy(), value, err_msg=variable.path)
    # The first step that does not overflow is the first step.
    optimizer.dynamic_scale.assign(2.0**10)
    model.train_on_batch(*nets.image_batch())
    assert int(inner.iterations) == 1
    assert_factors_equal(inner, reference.optimizer, 0.02)


@pytest.mark.slow
@pytest.mark.parametrize("policy", few(["mixed_bfloat16", "mixed_float16", "float64"], 1))
def test_training_arrives_where_float32_does(policy):
    losses = {}
    for name in ("float32", policy):
        model = compiled(policy=name, jit_compile=policy == "mixed_float16")
        history = model.fit(*nets.image_batch(96), epochs=4, verbose=0, shuffle=False)
        losses[name] = history.history["loss"]
    assert losses[policy][-1] < losses[policy][0] / 2
    np.testing.assert_allclose(
        losses[policy], losses["float32"], rtol=1e-4 if policy == "float64" else 0.1
    )


class OnlyParts(keras.Model):
    """Its train step calls a layer of the model, not the model, so that nobody sees its loss."""

    def __init__(self):
        super().__init__()
        self.part = keras.Sequential(
            [
                keras.Input((4,)),
                keras_kfc.layers.Dense(8, activation="tanh"),
                keras_kfc.layers.Dense(2),
            ]
        )

    def call(self, inputs):
        return self.part(inputs)

    def train_step(self, data):
        x, y = data[:2]
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(y - tf.cast(self.part(x, training=True), tf.float32)))
            scaled = self.optimizer.scale_loss(loss)
        gradients = tape.gradient(scaled, self.trainable_variables)
        self.optimizer.apply(gradients, self.trainable_variables)
        return {"error": loss}


def parts_in_float16(scale, **options):
    keras.config.set_dtype_policy("mixed_float16")
    keras.utils.set_random_seed(1)
    model = OnlyParts()
    model(np.ones((8, 4), "float32"))
    optimizer = keras.optimizers.LossScaleOptimizer(KFC(seed=1, **options), initial_scale=scale)
    model.compile(optimizer, "mse")
    return model


def fitted_in_float16(model):
    x = np.random.default_rng(0).normal(size=(64, 4)).astype("float32")
    history = model.fit(x, x[:, :2] ** 2, batch_size=32, epochs=30, shuffle=False, verbose=0)
    return history.history.get("error"), np.concatenate([w.ravel() for w in model.get_weights()])


@pytest.mark.nightly
def test_a_loss_scale_that_nobody_can_tell_changes_nothing():
    losses, weights = fitted_in_float16(parts_in_float16(2.0))
    others, other_weights = fitted_in_float16(parts_in_float16(2.0**10))
    assert losses[-1] < 0.5 * losses[0]
    np.testing.assert_allclose(others, losses, rtol=0.05)
    np.testing.assert_allclose(other_weights, weights, atol=0.03)


@pytest.mark.parametrize(
    "options",
    few([{"relative_damping": False}, {"polyak_scaling": None}], 0),
)
def test_options_that_depend_on_a_loss_scale_that_nobody_can_tell_say_what_to_do(options):
    model = parts_in_float16(2.0, **options)
    with pytest.raises(ValueError, match=r"cannot tell the loss scale.*`keras_kfc\.Capture"):
        fitted_in_float16(model)
    # The same model trains where the train step calls the whole of it.
    model.train_step = keras.Model.train_step.__get__(model)
    model.train_function = None
    assert np.isfinite(fitted_in_float16(model)[1]).all()
