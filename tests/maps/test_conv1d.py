"""Conv1D: its factors by explicit loops, its layer Keras's own."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import few

import keras_kfc
from conftest import naive_gamma, naive_omega, relative_error
from keras_kfc.maps.api import input_factor, output_factor
from keras_kfc.maps.conv1d import Conv1DMap

OPTIONS = [
    {"kernel_size": 3},
    {"kernel_size": 3, "strides": 2, "padding": "same"},
    {"kernel_size": 2, "padding": "causal", "dilation_rate": 2},
    {"kernel_size": 4, "padding": "same", "groups": 2},
    {"kernel_size": 3, "strides": 3, "use_bias": False},
]


def naive_factors(x, derivatives, group, kernel_size, groups, padding, strides, dilation, use_bias):
    """Both factors of a group, from the definition, as those of images of width 1."""
    if padding == "causal":
        x = np.pad(x, ((0, 0), (dilation * (kernel_size - 1), 0), (0, 0)))
        padding = "valid"
    width, columns = x.shape[-1] // groups, derivatives.shape[-1] // groups
    omega = naive_omega(
        x[:, :, None],
        (kernel_size, 1),
        (strides, 1),
        padding,
        (dilation, 1),
        use_bias,
        channels=slice(group * width, (group + 1) * width),
    )
    return omega, naive_gamma(derivatives[..., group * columns : (group + 1) * columns])


@pytest.mark.parametrize("options", OPTIONS)
def test_factors_are_those_of_the_definition(options):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3, 9, 4))
    layer = keras.layers.Conv1D(6, **options, dtype="float64")
    s = layer(x)
    derivatives = rng.normal(size=s.shape)
    groups, use_bias = options.get("groups", 1), options.get("use_bias", True)
    linear_map = Conv1DMap(
        options["kernel_size"],
        4,
        6,
        options.get("strides", 1),
        options.get("padding", "valid"),
        options.get("dilation_rate", 1),
        groups,
    )
    omega = input_factor(linear_map, [tf.constant(x)], tf.constant(3), use_bias).numpy()
    gamma = output_factor(linear_map, [tf.constant(derivatives)]).numpy()
    for group in range(groups):
        expected = naive_factors(
            x,
            derivatives,
            group,
            options["kernel_size"],
            groups,
            options.get("padding", "valid"),
            options.get("strides", 1),
            options.get("dilation_rate", 1),
            use_bias,
        )
        assert relative_error(omega[group], expected[0]) < 1e-12
        assert relative_error(gamma[group], expected[1]) < 1e-12
    kernel, bias = rng.normal(size=layer.kernel.shape), rng.normal(size=6)
    weights = linear_map.stack_bias(tf.constant(kernel), tf.constant(bias) if use_bias else None)
    again = linear_map.unstack_bias(weights)
    np.testing.assert_array_equal(again[0], kernel)
    assert (again[1] is None) != use_bias


def test_channels_first_is_the_same():
    rng = np.random.default_rng(0)
    x, derivatives = rng.normal(size=(3, 9, 4)), rng.normal(size=(3, 5, 6))
    maps = [
        Conv1DMap(3, 4, 6, strides=2, padding="causal", data_format=data_format)
        for data_format in ("channels_last", "channels_first")
    ]
    factors = [
        (
            input_factor(linear_map, [tf.constant(inputs)], tf.constant(3), True),
            output_factor(linear_map, [tf.constant(back)]),
        )
        for linear_map, inputs, back in zip(
            maps,
            (x, np.moveaxis(x, -1, 1)),
            (derivatives, np.moveaxis(derivatives, -1, 1)),
            strict=True,
        )
    ]
    for last, first in zip(*factors, strict=True):
        np.testing.assert_allclose(first, last, rtol=1e-12)


def test_rows_of_the_weights_match_the_patches():
    """The pre-activation is the patch with a one, times the weights with bias."""
    rng = np.random.default_rng(1)
    x = rng.normal(size=(1, 3, 4))
    layer = keras_kfc.layers.Conv1D(5, 3, bias_initializer="ones", dtype="float64")
    s = layer(x).numpy()[0, 0]
    weights = layer.linear_map.stack_bias(layer.kernel.value, layer.bias.value).numpy()[0]
    np.testing.assert_allclose(np.append(x[0].ravel(), 1.0) @ weights, s)


@pytest.mark.parametrize("options", few(OPTIONS, 2))
def test_the_layer_computes_and_trains_as_keras_own(options):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(6, 9, 4)).astype("float32"), rng.normal(size=(6, 1)).astype("float32")
    results = []
    for kind in (keras.layers.Conv1D, keras_kfc.layers.Conv1D):
        keras.utils.set_random_seed(5)
        layer = kind(6, activation="tanh", **options)
        pooled = keras.layers.GlobalAveragePooling1D()
        model = keras.Sequential([keras.Input((9, 4)), layer, pooled, keras.layers.Dense(1)])
        model.compile("adam", "mse", run_eagerly=True)
        model.fit(x, y, epochs=2, shuffle=False, verbose=0)
        results.append([model(x).numpy(), *model.get_weights()])
    for plain, capturing in zip(*results, strict=True):
        np.testing.assert_array_equal(capturing, plain)
    config = layer.get_config()
    assert keras_kfc.layers.Conv1D.from_config(config).get_config() == config


def test_a_model_is_instrumented_and_has_the_factors_of_its_data():
    rng = np.random.default_rng(2)
    x = rng.normal(size=(8, 9, 4)).astype("float32")
    model = keras.Sequential([keras.Input((9, 4)), keras.layers.Conv1D(3, 2, name="conv")])
    keras_kfc.instrument(model)
    assert keras_kfc.coverage(model).covered == [model.layers[0].path]
    model.compile(keras_kfc.KFC(fisher="exact", curvature_update_period=1), "mse", run_eagerly=True)
    model.train_on_batch(x, np.zeros((8, 8, 3)))
    (block,) = model.optimizer.blocks
    expected = naive_omega(x[:, :, None], (2, 1), (1, 1), "valid", (1, 1), True)
    assert relative_error(block.omega[0], expected) < 1e-5
    # Of mean squares over 8 positions and 3 outputs: 2 / 24 for each example's sum.
    assert relative_error(block.gamma[0], np.eye(3) * 2 / 24) < 1e-5


@pytest.mark.slow
def test_a_net_of_convolutions_learns_faster_than_with_the_fallback_rule():
    rng = np.random.default_rng(3)
    x = rng.normal(size=(256, 12, 2)).astype("float32")
    y = np.tanh(x[:, 2:, :1] * x[:, 1:-1, :1] - x[:, :-2, 1:]).astype("float32")

    def loss(exclude):
        keras.utils.set_random_seed(1)
        stack = [keras.layers.Conv1D(8, 3, activation="tanh"), keras.layers.Conv1D(1, 1)]
        model = keras.Sequential([keras.Input((12, 2)), *stack])
        keras_kfc.instrument(model, exclude=[layer.name for layer in stack] if exclude else [])
        model.compile(keras_kfc.KFC(seed=1), "mse")
        model.optimizer.build(model.trainable_variables)
        return model.fit(x, y, batch_size=64, epochs=10, verbose=0).history["loss"][-1]

    assert loss(exclude=False) < 0.8 * loss(exclude=True)
