"""Cases where theory says what the factors, the step and the trajectory must be.

The Fisher block is exact for one datum, for deep linear networks with squared
error, and where a convolution has a single output position; undamped steps
solve linear least squares at once and do not depend on affine changes of
coordinates of activations. Each property comes with a control that fails it.
"""

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_kfc
from conftest import explicit_ggn, relative_error
from keras_kfc.linalg.damping import block_damping


@pytest.fixture(autouse=True)
def _float64():
    keras.config.set_floatx("float64")


def blocks_of(model, inputs, loss, targets=None, fisher="exact"):
    """`omega ⊗ gamma` of every layer, by layer name."""
    factors = keras_kfc.kronecker_factors(
        model, inputs, targets, loss=loss, fisher=fisher, batch_size=len(inputs)
    )
    return {path.split("/")[-1]: np.kron(part.omega, part.gamma) for path, part in factors.items()}


def ggn_of(model, layer_name, inputs, loss_of_outputs):
    """Explicit matrix over one layer's joint [kernel; bias]."""
    layer = model.get_layer(layer_name)
    variables = [layer.kernel.value] + ([layer.bias.value] if layer.use_bias else [])
    return explicit_ggn(model, tf.constant(inputs), variables, loss_of_outputs)


def mse_of(targets):
    return lambda outputs: tf.reduce_mean(tf.square(outputs - targets))


def test_block_is_exact_for_deep_linear_networks_with_squared_error():
    keras.utils.set_random_seed(1)
    model = keras.Sequential(
        [keras.Input((3,))] + [keras.layers.Dense(n, name=f"d{i}") for i, n in enumerate((4, 2, 3))]
    )
    inputs = np.random.default_rng(0).normal(size=(7, 3))
    targets = 3 * np.random.default_rng(1).normal(size=(7, 3))
    exact = blocks_of(model, inputs, "mse")
    empirical = blocks_of(model, inputs, "mse", targets, "empirical")
    for name, block in exact.items():
        expected = ggn_of(model, name, inputs, mse_of(targets))
        assert relative_error(block, expected) < 1e-6
        assert relative_error(empirical[name], expected) > 0.1  # negative control


def test_block_is_exact_for_one_datum():
    keras.utils.set_random_seed(1)
    model = keras.Sequential(
        [
            keras.Input((3,)),
            keras.layers.Dense(4, activation="tanh", name="hidden"),
            keras.layers.Dense(3, name="logits"),
        ]
    )
    inputs = np.random.default_rng(0).normal(size=(1, 3))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    exact = blocks_of(model, inputs, loss)
    empirical = blocks_of(model, inputs, loss, np.array([1]), "empirical")
    for name in ("hidden", "logits"):
        expected = ggn_of(model, name, inputs, lambda outputs: loss(np.array([1]), outputs))
        assert relative_error(exact[name], expected) < 1e-6
        assert relative_error(empirical[name], expected) > 0.1  # negative control


def test_block_is_not_exact_without_the_assumptions():
    """Negative control: two data and a nonlinearity break the factorisation."""
    model = keras.Sequential(
        [
            keras.Input((3,)),
            keras.layers.Dense(4, activation="tanh", name="a"),
            keras.layers.Dense(2),
        ]
    )
    inputs = np.random.default_rng(0).normal(size=(5, 3)) * 2
    block = blocks_of(model, inputs, "mse")["a"]
    assert relative_error(block, ggn_of(model, "a", inputs, mse_of(0.0))) > 0.01


@pytest.mark.parametrize("use_bias", [True, False])
def test_block_is_exact_for_a_convolution_with_one_output_position(use_bias):
    """It equals a Dense layer; linear with squared error, so the block is exact."""
    keras.utils.set_random_seed(1)
    convolution = keras.layers.Conv2D(3, (3, 2), use_bias=use_bias, name="layer")
    model = keras.Sequential([keras.Input((3, 2, 2)), convolution, keras.layers.Flatten()])
    inputs = np.random.default_rng(0).normal(size=(6, 3, 2, 2))
    block = blocks_of(model, inputs, "mse")["layer"]
    assert relative_error(block, ggn_of(model, "layer", inputs, mse_of(0.0))) < 1e-6
    flat = inputs.reshape(6, -1)
    dense = keras.Sequential(
        [keras.Input((12,)), keras.layers.Dense(3, use_bias=use_bias, name="layer")]
    )
    assert relative_error(block, blocks_of(dense, flat, "mse")["layer"]) < 1e-6


def test_undamped_step_solves_linear_least_squares():
    keras.utils.set_random_seed(1)
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(40, 5)) @ rng.normal(size=(5, 5))
    targets = rng.normal(size=(40, 3))
    extended = np.append(inputs, np.ones((40, 1)), axis=1)
    solution = np.linalg.lstsq(extended, targets, rcond=None)[0]
    for optimizer, lands in (
        (keras_kfc.KFC(1.0, damping=0.0, momentum=0.0, polyak_scaling=None, fisher="exact"), True),
        (keras.optimizers.SGD(1.0), False),
    ):
        model = keras.Sequential([keras.Input((5,)), keras_kfc.layers.Dense(3)])
        model.compile(optimizer=optimizer, loss="mse")
        model.train_on_batch(inputs, targets)
        kernel, bias = model.get_weights()
        error = relative_error(np.vstack((kernel, bias)), solution)
        assert error < 1e-8 if lands else error > 0.1


@pytest.mark.parametrize("relative_damping", [True, False])
@pytest.mark.parametrize("setting", ["expand", "trace"])
def test_direction_solves_the_explicit_damped_kronecker_system(relative_damping, setting):
    rng = np.random.default_rng(0)

    def positive(n):
        root = rng.normal(size=(n, 2 * n))
        return root @ root.T / n

    stored = omega, gamma = positive(5), 0.01 * positive(3)
    damping = 0.3
    if setting == "trace":
        gamma = gamma / np.trace(gamma)
    means = np.trace(omega) / 5, np.trace(gamma) / 3
    strength = damping * means[0] * means[1] if relative_damping else damping
    pi = np.sqrt(means[0] / means[1])
    damped = np.kron(
        omega + pi * np.sqrt(strength) * np.eye(5), gamma + np.sqrt(strength) / pi * np.eye(3)
    )
    joint = rng.normal(size=(5, 3))
    expected = np.linalg.solve(damped, joint.reshape(-1)).reshape(5, 3)

    layer = keras_kfc.layers.Dense(3)
    layer.build((None, 4))
    optimizer = keras_kfc.KFC(
        damping=damping, relative_damping=relative_damping, weight_sharing=setting
    )
    optimizer.build([layer.kernel, layer.bias])
    (block,) = optimizer.blocks
    block.omega.assign(stored[0][None])
    block.gamma.assign(stored[1][None])
    block.ema_weight.assign(1.0)
    optimizer.parts.measuring.refresh_inverses()
    np.testing.assert_allclose(block.multiply(joint[None])[0], expected, rtol=1e-6)


def test_dead_layers_get_the_papers_pi_and_the_networks_damping():
    omega_means, gamma_means = tf.constant([2.0, 0.0, 0.0]), tf.constant([0.0, 4.0, 0.0])
    shifts = block_damping(omega_means, gamma_means, 0.09, None)
    np.testing.assert_allclose(shifts, np.full((2, 3), 0.3))
    shifts = block_damping(omega_means, gamma_means, 0.09, tf.constant(5.0))
    np.testing.assert_allclose(shifts, 0.3 * np.array([[2, 5 / 4, 1], [5 / 2, 4, 5]]), rtol=1e-6)
