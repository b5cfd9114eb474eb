"""Omega and Gamma against naive loops over positions, for every kind of convolution."""

import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import few

import keras_kfc
from conftest import naive_gamma, naive_omega, relative_error, softmax
from keras_kfc.maps.api import input_factor, output_factor
from keras_kfc.maps.conv import Conv2DMap
from keras_kfc.maps.dense import DenseMap
from keras_kfc.patches.im2col import extract_patches

KERNELS = [(1, 1), (2, 2), (3, 3), (5, 5), (2, 3), (3, 1)]
GEOMETRIES = [
    ((1, 1), (1, 1)),
    ((2, 2), (1, 1)),
    ((1, 3), (1, 1)),
    ((1, 1), (2, 2)),
    ((1, 1), (1, 2)),
]
CASES = [
    (kernel, strides, padding, dilation, size, channels)
    for kernel, (strides, dilation), padding, size, channels in itertools.product(
        KERNELS, GEOMETRIES, ("same", "valid"), ((9, 10), (10, 9)), (1, 3)
    )
    if padding == "same"
    or all((k - 1) * d < n for k, d, n in zip(kernel, dilation, size, strict=True))
]


@pytest.mark.usefixtures("eager_functions")
@pytest.mark.parametrize("use_bias", few([True, False], 1))
@pytest.mark.parametrize("data_format", few(["channels_last", "channels_first"], 1))
def test_omega_equals_loops_over_positions(data_format, use_bias):
    for kernel, strides, padding, dilation, size, channels in CASES:
        images = np.random.default_rng(0).normal(size=(2, *size, channels)).astype("float32")
        expected = naive_omega(images, kernel, strides, padding, dilation, use_bias)
        if data_format == "channels_first":
            images = images.transpose(0, 3, 1, 2)
        geometry = Conv2DMap(kernel, channels, 4, strides, padding, dilation, 1, data_format)
        omega = input_factor(geometry, [tf.constant(images)], 2, use_bias)
        case = (kernel, strides, padding, dilation, size, channels)
        assert omega.shape == (1, *expected.shape), case
        assert relative_error(omega[0], expected) < 1e-5, case


@pytest.mark.parametrize("padding", ["same", "valid"])
def test_omega_of_grouped_convolution_has_a_block_for_each_group(padding):
    images = np.random.default_rng(0).normal(size=(3, 6, 5, 6)).astype("float32")
    geometry = Conv2DMap((3, 2), 6, 8, padding=padding, groups=2)
    omega = input_factor(geometry, [tf.constant(images)], 3, True)
    for group, channels in enumerate((slice(0, 3), slice(3, 6))):
        expected = naive_omega(images, (3, 2), (1, 1), padding, (1, 1), True, channels=channels)
        assert relative_error(omega[group], expected) < 1e-5


def test_gamma_is_a_mean_over_examples_and_positions():
    derivatives = np.random.default_rng(0).normal(size=(3, 4, 5, 6)).astype("float32")
    gamma = output_factor(Conv2DMap((3, 3), 2, 6), [tf.constant(derivatives)])
    assert relative_error(gamma[0], naive_gamma(derivatives)) < 1e-6
    first = output_factor(
        Conv2DMap((3, 3), 2, 6, data_format="channels_first"),
        [tf.constant(derivatives.transpose(0, 3, 1, 2))],
    )
    np.testing.assert_allclose(first, gamma, rtol=1e-6)


def test_dense_on_higher_ranks_counts_middle_axes_as_positions():
    rng = np.random.default_rng(0)
    inputs, derivatives = rng.normal(size=(4, 3, 2, 5)), rng.normal(size=(4, 3, 2, 7))
    omega = input_factor(DenseMap(5, 7), [tf.constant(inputs)], 4, True)
    rows = np.concatenate([inputs.reshape(4, 6, 5), np.ones((4, 6, 1))], axis=-1)
    expected = np.einsum("bti,btj->ij", rows, rows) / 4
    np.testing.assert_allclose(omega[0], expected, rtol=1e-12)
    gamma = output_factor(DenseMap(5, 7), [tf.constant(derivatives)])
    np.testing.assert_allclose(gamma[0], naive_gamma(derivatives), rtol=1e-12)


@pytest.mark.parametrize(
    "geometry",
    [
        DenseMap(5, 4),
        Conv2DMap((2, 3), 4, 6),
        Conv2DMap((2, 3), 4, 6, groups=2),
    ],
)
@pytest.mark.parametrize("use_bias", [True, False])
def test_joint_matrix_splits_back(geometry, use_bias):
    rng = np.random.default_rng(0)
    shape = (5, 4) if isinstance(geometry, DenseMap) else (2, 3, 4 // geometry.groups, 6)
    kernel = tf.constant(rng.normal(size=shape))
    bias = tf.constant(rng.normal(size=shape[-1:])) if use_bias else None
    joint = geometry.stack_bias(kernel, bias)
    kernel_back, bias_back = geometry.unstack_bias(joint)
    np.testing.assert_array_equal(kernel_back, kernel)
    if use_bias:
        np.testing.assert_array_equal(bias_back, bias)
    else:
        assert bias_back is None


def test_rows_of_the_joint_matrix_match_the_patches():
    """The gradient of a convolution is patchesᵀ derivatives, group by group."""
    rng = np.random.default_rng(0)
    layer = keras_kfc.layers.Conv2D(6, (3, 2), groups=2, padding="same", dtype="float64")
    images = tf.constant(rng.normal(size=(2, 5, 4, 4)))
    layer.build(images.shape)
    derivatives = tf.constant(rng.normal(size=(2, 5, 4, 6)))
    with tf.GradientTape() as tape:
        outputs = layer(images)
    kernel, bias = tape.gradient(outputs, [layer.kernel, layer.bias], output_gradients=derivatives)
    geometry = layer.linear_map
    patches = extract_patches(images, (3, 2), padding="same", groups=2)
    ones = tf.ones((2, patches.shape[1], 1), tf.float64)
    expected = tf.matmul(
        tf.concat((patches, ones), -1), geometry.derivative_rows(derivatives), transpose_a=True
    )
    np.testing.assert_allclose(geometry.stack_bias(kernel, bias), expected, rtol=1e-10, atol=1e-12)


def two_layer_factors(fisher, seed=0, padding="same", copies=1):
    """Factors of a small classifier by the package, and the tensors to check them with."""
    keras.utils.set_random_seed(3)
    model = keras.Sequential(
        [
            keras.Input((6, 5, 2)),
            keras.layers.Conv2D(
                3, (3, 2), strides=2, padding=padding, activation="tanh", name="conv"
            ),
            keras.layers.Flatten(),
            keras.layers.Dense(4, name="dense"),
        ]
    )
    images = np.random.default_rng(1).normal(size=(10, 6, 5, 2)).astype("float32")
    labels = np.arange(10) % 4
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    factors = keras_kfc.kronecker_factors(
        model,
        np.repeat(images, copies, axis=0),
        np.repeat(labels, copies),
        loss=loss,
        fisher=fisher,
        batch_size=4 * copies,
        seed=seed,
    )
    return model, images, labels, {path.split("/")[-1]: part for path, part in factors.items()}


def by_hand(model, images, output_derivatives):
    """Pre-activation derivatives of the two layers for given logit derivatives, in NumPy."""
    convolution, _, dense = model.layers
    kernel = dense.kernel.numpy().astype("float64")
    hidden = convolution(images).numpy().astype("float64")
    into_hidden = (output_derivatives @ kernel.T).reshape(hidden.shape)
    return into_hidden * (1 - hidden**2), output_derivatives


@pytest.mark.parametrize("padding", ["same", "valid"])
def test_exact_factors_of_a_classifier_equal_the_definition(padding):
    model, images, _, factors = two_layer_factors("exact", padding=padding)
    probabilities = softmax(model(images))
    gammas = [0.0, 0.0]
    for label in range(4):
        derivatives = (probabilities - np.eye(4)[label]) * np.sqrt(probabilities[:, [label]])
        for number, part in enumerate(by_hand(model, images, derivatives)):
            gammas[number] = gammas[number] + naive_gamma(part)
    convolution, dense = factors["conv"], factors["dense"]
    assert convolution.omega.dtype == convolution.gamma.dtype == np.float32
    assert relative_error(convolution.gamma, gammas[0]) < 1e-5
    assert relative_error(dense.gamma, gammas[1]) < 1e-5
    omega = naive_omega(images, (3, 2), (2, 2), padding, (1, 1), True)
    assert relative_error(convolution.omega, omega) < 1e-5
    hidden = model.layers[0](images).numpy().reshape(10, 1, 1, -1)
    dense_omega = naive_omega(hidden, (1, 1), (1, 1), "valid", (1, 1), True)
    assert relative_error(dense.omega, dense_omega) < 1e-5


def test_empirical_factors_use_the_training_targets():
    model, images, labels, factors = two_layer_factors("empirical")
    derivatives = softmax(model(images)) - np.eye(4)[labels]
    parts = by_hand(model, images, derivatives)
    assert relative_error(factors["conv"].gamma, naive_gamma(parts[0])) < 1e-5
    assert relative_error(factors["dense"].gamma, naive_gamma(parts[1])) < 1e-5


@pytest.mark.nightly
def test_sampled_converges_to_exact_as_draws_grow():
    exact = two_layer_factors("exact")[-1]
    errors = {}
    for copies in (1, 16, 256):
        # Each copy of the data gets draws of its own.
        sampled = two_layer_factors("sampled", copies=copies)[-1]["conv"].gamma
        errors[copies] = relative_error(sampled, exact["conv"].gamma)
    # The error of a mean falls as the root of the number of draws, by 16 in all.
    assert errors[16] < errors[1] / 2
    assert errors[256] < errors[1] / 6
    assert errors[256] < 0.05
    empirical = two_layer_factors("empirical")[-1]["conv"].gamma
    assert relative_error(empirical, exact["conv"].gamma) > 4 * errors[256]


@pytest.mark.slow
def test_sampled_factors_repeat_under_a_seed():
    first, again = (two_layer_factors("sampled", seed=5)[-1] for _ in range(2))
    other = two_layer_factors("sampled", seed=6)[-1]
    np.testing.assert_array_equal(first["dense"].gamma, again["dense"].gamma)
    assert relative_error(other["dense"].gamma, first["dense"].gamma) > 1e-3


def test_kronecker_factors_leaves_the_model_as_it_was():
    model, images, labels, _ = two_layer_factors("sampled")
    model.compile(loss="mse", optimizer="sgd")
    classes = [type(layer) for layer in model.layers]
    before = model.get_weights()
    with pytest.raises(ValueError, match="Argument `y` is needed"):
        keras_kfc.kronecker_factors(model, images, fisher="empirical")
    keras_kfc.kronecker_factors(model, images)
    assert [type(layer) for layer in model.layers] == classes
    assert classes[0] is keras.layers.Conv2D
    for old, new in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)


def test_instrumented_and_plain_models_give_the_same_factors():
    model, images, labels, factors = two_layer_factors("exact")
    keras_kfc.instrument(model)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    again = keras_kfc.kronecker_factors(model, images, loss=loss, fisher="exact", batch_size=10)
    assert type(model.layers[0]) is keras_kfc.layers.Conv2D
    for path, part in again.items():
        np.testing.assert_allclose(
            part.gamma, factors[path.split("/")[-1]].gamma, rtol=1e-4, atol=1e-7
        )


def test_layers_of_one_path_are_told_apart():
    def branch(seed):
        inputs = keras.Input((3,))
        keras.utils.set_random_seed(seed)
        return keras.Model(inputs, keras.layers.Dense(4, name="fc")(inputs), name=f"branch_{seed}")

    inputs = keras.Input((3,))
    first, second = branch(1), branch(2)
    model = keras.Model(inputs, keras.layers.Dense(1, name="head")(second(first(inputs)[:, :3])))
    assert first.layers[-1].path == second.layers[-1].path
    x = np.random.default_rng(0).normal(size=(6, 3)).astype("float32")
    factors = keras_kfc.kronecker_factors(model, x, loss="mse")
    assert list(factors) == ["fc", "fc_1", "head"]
    assert relative_error(factors["fc"].omega[:3, :3], x.T @ x / 6) < 1e-5
    hidden = first(x).numpy()[:, :3]
    assert relative_error(factors["fc_1"].omega[:3, :3], hidden.T @ hidden / 6) < 1e-5


@pytest.mark.parametrize(
    ("name", "error", "options"),
    [
        ("x", TypeError, {"x": None}),
        ("x", TypeError, {"x": [[1.0, 2.0]]}),
        ("x", ValueError, {"x": np.ones((0, 4))}),
        ("y", ValueError, {"y": np.ones((3, 2))}),
        ("y", ValueError, {"fisher": "empirical"}),
        ("loss", ValueError, {"loss": None}),
        ("batch_size", ValueError, {"batch_size": 0}),
        ("seed", TypeError, {"seed": 0.5}),
        ("model", TypeError, {"model": "net"}),
    ],
)
def test_bad_arguments_of_kronecker_factors_are_refused_by_name(name, error, options):
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    options = {"model": model, "x": np.ones((8, 4)), "loss": "mse", **options}
    with pytest.raises(error, match=f"`{name}`"):
        keras_kfc.kronecker_factors(**options)


def test_uses_of_a_shared_layer_count_as_positions():
    keras.utils.set_random_seed(3)
    shared = keras.layers.Dense(2, name="shared")
    left, right = keras.Input((3,)), keras.Input((3,))
    model = keras.Model([left, right], shared(left) - 2 * shared(right))
    rng = np.random.default_rng(1)
    x = [rng.normal(size=(6, 3)).astype("float32") for _ in range(2)]
    factors = keras_kfc.kronecker_factors(model, x, loss="mse", fisher="exact")["shared"]
    rows = [np.append(part, np.ones((6, 1)), axis=1).astype("float64") for part in x]
    expected = sum(part.T @ part for part in rows) / 6
    assert relative_error(factors.omega, expected) < 1e-5
    # Two positions with output derivatives I and -2 I (times the root of 2/D = 1).
    assert relative_error(factors.gamma, np.eye(2) * (1 + 4) / 2) < 1e-5
