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
from helpers import few, inverses_of

import keras_kfc
from conftest import explicit_ggn, relative_error
from keras_kfc.linalg.damping import BlockShape, block_damping
from keras_kfc.linalg.inverse import damped_inverse, inverse_root


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
def test_direction_solves_the_explicit_damped_kronecker_system(relative_damping):
    rng = np.random.default_rng(0)

    def positive(n):
        root = rng.normal(size=(n, 2 * n))
        return root @ root.T / n

    omega, gamma, damping = positive(5), 0.01 * positive(3), 0.3
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
    optimizer = keras_kfc.KFC(damping=damping, relative_damping=relative_damping)
    optimizer.build([layer.kernel, layer.bias])
    (block,) = optimizer.blocks
    block.omega.assign(omega[None])
    block.gamma.assign(gamma[None])
    block.ema_weight.assign(1.0)
    optimizer.parts.measuring.refresh_inverses()
    np.testing.assert_allclose(block.multiply(joint[None])[0], expected, rtol=1e-6)


def test_dead_layers_get_the_papers_pi_and_the_networks_damping():
    omega_means, gamma_means = tf.constant([2.0, 0.0, 0.0]), tf.constant([0.0, 4.0, 0.0])
    shifts = block_damping(omega_means, gamma_means, 0.09, None)
    np.testing.assert_allclose(shifts, np.full((2, 3), 0.3))
    shifts = block_damping(omega_means, gamma_means, 0.09, tf.constant(5.0))
    np.testing.assert_allclose(shifts, 0.3 * np.array([[2, 5 / 4, 1], [5 / 2, 4, 5]]), rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_inverse_never_raises(dtype):
    """Singular, zero, tiny, huge and broken matrices: numbers, or NaN, but no error."""
    rng = np.random.default_rng(0)
    finite = []
    for n in (1, 2, 17, 130):
        for rank in (1, 2, n // 2 + 1):
            for scale in (1e-30, 1e-8, 1.0, 1e12):
                root = rng.normal(size=(n, rank)) * np.sqrt(scale)
                finite.append(root @ root.T)
        finite += [np.ones((n, n)), np.diag(np.r_[np.zeros(n - 1), 1.0])]
    for matrix in finite:
        matrix = matrix.astype(dtype)
        inverse = damped_inverse(tf.constant(matrix[None]), tf.zeros((1,), dtype))[0].numpy()
        assert np.isfinite(inverse).all()
        assert (np.diag(inverse) > 0).all()
    for broken in (np.nan, np.inf):
        matrix = np.eye(4, dtype=dtype)
        matrix[1, 2] = broken
        inverse = damped_inverse(tf.constant(matrix[None]), tf.ones((1,), dtype))
        assert np.isnan(inverse).all()
    assert np.isnan(damped_inverse(tf.zeros((1, 3, 3), dtype), tf.zeros((1,), dtype))).all()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_nearly_singular_matrices_have_inverses(dtype):
    """Smooth kernels, whose eigenvalues fall below rounding, and two inputs almost equal."""
    resolution = float(np.finfo(dtype).eps)
    matrices = [np.array([[1, 1 + 25 * resolution], [1 + 25 * resolution, 1]])]
    for n in (5, 64, 130, 150, 300):
        grid = np.linspace(0, 1, n)
        matrices.append(np.exp(-((grid[:, None] - grid) ** 2) / 0.5))
        matrices.append(1 / (1 + np.arange(n)[:, None] + np.arange(n)))
        matrices.append(np.ones((n, n)))
    for matrix in matrices:
        for damping in (0.0, 10 * resolution, 1000 * resolution):
            shift = damping * len(matrix)
            inverse = damped_inverse(tf.constant(matrix[None], dtype), tf.constant([shift], dtype))
            assert np.isfinite(inverse).all(), (len(matrix), damping)


@pytest.mark.parametrize("jit_compile", [False, True])
@pytest.mark.parametrize("shift", [0.3, 1e-3])
@pytest.mark.parametrize("size", few([30, 129, 1, 64, 65, 300], 2))
def test_damped_inverse_is_the_inverse(jit_compile, shift, size):
    """One block and several, with more and less damping."""
    root = np.random.default_rng(0).normal(size=(2, size, 2 * size)).astype("float32")
    matrix = tf.matmul(root, root, transpose_b=True) / (2 * size)
    shifts = tf.constant([shift, 2 * shift])
    result = tf.function(damped_inverse, jit_compile=jit_compile)(matrix, shifts)
    damped = matrix.numpy().astype("float64") + shifts.numpy()[:, None, None] * np.eye(size)
    expected = np.linalg.inv(damped)
    assert relative_error(result, expected) < 2e-5
    np.testing.assert_allclose(result, tf.linalg.matrix_transpose(result), rtol=1e-4, atol=1e-5)
    undamped = np.linalg.inv(damped - shifts.numpy()[:, None, None] * np.eye(size))
    assert relative_error(result, undamped) > 2e-4 or shift < 0.3


def test_inverse_root_is_the_inverse_of_the_cholesky_factor():
    root = np.random.default_rng(0).normal(size=(2, 150, 300))
    matrix = root @ root.transpose(0, 2, 1)
    expected = np.linalg.inv(np.linalg.cholesky(matrix))
    np.testing.assert_allclose(inverse_root(tf.constant(matrix)), expected, atol=1e-12)


def test_factors_of_one_size_are_inverted_as_each_alone():
    rng = np.random.default_rng(0)

    def factor(count, size):
        root = rng.normal(size=(count, size, 3 * size))
        return tf.constant(root @ root.transpose(0, 2, 1) * rng.uniform(0.1, 10))

    # Sizes recur among omegas, among gammas and between the two, with groups too.
    omegas = [factor(1, 5), factor(1, 4), factor(2, 5), factor(1, 5)]
    gammas = [factor(1, 4), factor(1, 5), factor(2, 4), factor(1, 3)]
    shapes = [
        BlockShape(omega.shape[0], omega.shape[1], gamma.shape[1])
        for omega, gamma in zip(omegas, gammas, strict=True)
    ]
    results = inverses_of(omegas, gammas, shapes, 0.2, False)
    compiled = tf.function(inverses_of, jit_compile=True)(omegas, gammas, shapes, 0.2, False)
    flat, flat_compiled = tf.nest.flatten(results), tf.nest.flatten(compiled)
    for one, other in zip(flat, flat_compiled, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-10)
    for number, (omega, gamma) in enumerate(zip(omegas, gammas, strict=True)):
        # The paper's π for each group.
        means = [np.trace(part, axis1=1, axis2=2) / part.shape[-1] for part in (omega, gamma)]
        pi = np.sqrt(means[0] / means[1])
        shifts = np.sqrt(0.2) * pi, np.sqrt(0.2) / pi
        for result, matrix, shift in zip(results, (omega, gamma), shifts, strict=True):
            identity = np.eye(matrix.shape[-1])
            expected = np.linalg.inv(matrix + shift[:, None, None] * identity)
            np.testing.assert_allclose(result[number], expected, rtol=1e-8, atol=1e-12)


class _Affine(keras.layers.Layer):
    """Multiplies channels by a matrix and adds a vector; not trained."""

    def __init__(self, matrix, vector):
        super().__init__()
        self.matrix, self.vector = tf.constant(matrix), tf.constant(vector)

    def call(self, inputs):
        return tf.matmul(inputs, self.matrix) + self.vector


def _reparameterised(optimizer, steps):
    """Trains a net and the same function in other coordinates; returns both outputs.

    Second net: activations A → A V + d before each convolution and pre-activations
    S → S U + c after it, absorbed by the initial weights.
    """
    rng = np.random.default_rng(0)
    images = rng.normal(size=(24, 6, 6, 2))
    labels = np.arange(24) % 3
    affine = [(np.eye(c) + 0.4 * rng.normal(size=(c, c)), rng.normal(size=c)) for c in (2, 3, 3, 4)]

    def build(changed):
        keras.utils.set_random_seed(1)
        inputs = keras.Input((6, 6, 2))
        hidden, layers = inputs, []
        for number, filters in enumerate((3, 4)):
            layers.append(keras_kfc.layers.Conv2D(filters, 3))
            if changed:
                hidden = _Affine(*affine[2 * number])(hidden)
            hidden = layers[-1](hidden)
            if changed:
                hidden = _Affine(*affine[2 * number + 1])(hidden)
            hidden = keras.layers.Activation("tanh")(hidden)
        layers.append(keras_kfc.layers.Dense(3))
        outputs = layers[-1](keras.layers.Flatten()(hidden))
        return keras.Model(inputs, outputs), layers

    plain, plain_layers = build(False)
    changed, changed_layers = build(True)
    for number, (old, new) in enumerate(zip(plain_layers[:2], changed_layers[:2], strict=True)):
        kernel, bias = old.get_weights()
        before, shift_before = affine[2 * number]
        after, shift_after = affine[2 * number + 1]
        # (A V + d) W' + b' followed by U, c must equal A W + b.
        to_new = np.linalg.inv(before)
        kernel_new = np.einsum("ij,hwjo,op->hwip", to_new, kernel, np.linalg.inv(after))
        bias_new = (bias - shift_after) @ np.linalg.inv(after)
        bias_new = bias_new - np.einsum("i,hwio->o", shift_before, kernel_new)
        new.set_weights([kernel_new, bias_new])
    changed_layers[2].set_weights(plain_layers[2].get_weights())
    outputs = []
    for model in (plain, changed):
        model.compile(
            optimizer=optimizer(),
            loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        )
        start = model.predict(images, verbose=0)
        model.fit(images, labels, batch_size=24, epochs=steps, verbose=0, shuffle=False)
        outputs.append((start, model.predict(images, verbose=0)))
    return outputs


@pytest.mark.slow
def test_undamped_training_is_invariant_to_affine_changes_of_coordinates():
    def kfc():
        return keras_kfc.KFC(
            0.2,
            damping=1e-13,
            polyak_scaling=None,
            norm_constraint=1e-3,
            fisher="exact",
            curvature_update_period=1,
            inverse_update_period=1,
            # Zero is another place in other coordinates.
            weight_decay=None,
        )

    (start, end), (changed_start, changed_end) = _reparameterised(kfc, 5)
    assert relative_error(changed_start, start) < 1e-10
    assert relative_error(end, start) > 0.05  # it did train
    assert relative_error(changed_end, end) < 1e-3 * relative_error(end, start)


def test_gradient_descent_is_not_invariant():
    """Negative control of the test above."""
    (start, end), (changed_start, changed_end) = _reparameterised(
        lambda: keras.optimizers.SGD(0.2, momentum=0.9), 5
    )
    assert relative_error(changed_start, start) < 1e-10
    assert relative_error(changed_end, end) > 0.1 * relative_error(end, start)
