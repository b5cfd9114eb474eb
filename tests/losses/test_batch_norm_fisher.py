"""Below a batch normalisation in training mode, examples depend on each other.

Gamma is then defined by independent draws for each example. The oracle takes it from the
Jacobian of a net written down here, in float64.
"""

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import few

import keras_kfc
from conftest import relative_error
from keras_kfc._compat.keras_internals import compile_loss
from keras_kfc.curvature.layout import KroneckerLayout
from keras_kfc.losses.derivatives import output_derivatives
from keras_kfc.losses.terms import loss_terms
from keras_kfc.passes.statistics import ExampleSubset, measure

RNG = np.random.default_rng(0)
EXAMPLES, POSITIONS, CHANNELS = 6, 2, 3
X = RNG.normal(size=(EXAMPLES, POSITIONS, 4))
Y = RNG.normal(size=(EXAMPLES, POSITIONS, 2))
EPSILON = 1e-3


@pytest.fixture(autouse=True)
def _float64():
    keras.config.set_floatx("float64")


def captured():
    """A captured forward pass, the outputs, and the weights."""
    keras.utils.set_random_seed(3)
    below = keras_kfc.layers.Dense(CHANNELS, use_bias=False)
    norm = keras.layers.BatchNormalization(epsilon=EPSILON)
    head = keras.layers.Dense(2, use_bias=False)
    with keras_kfc.Capture() as capture:
        outputs = head(norm(below(X), training=True))
    return capture, outputs, below.kernel.numpy(), head.kernel.numpy()


def jacobian_of_the_net(below, head):
    """Of outputs `(B, T, 2)` in pre-activations `(B, T, 3)`, with the batch's statistics."""
    point = tf.constant(X @ below)
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(point)
        mean = tf.reduce_mean(point, axis=(0, 1))
        variance = tf.reduce_mean(tf.square(point - mean), axis=(0, 1))
        outputs = (point - mean) / tf.sqrt(variance + EPSILON) @ head
    return tape.jacobian(outputs, point, experimental_use_pfor=False).numpy()


def gamma_of(derivatives):
    """`(B, T, 3)` to the mean over examples and positions of the outer products."""
    return np.einsum("bti,btj->ij", derivatives, derivatives) / (EXAMPLES * POSITIONS)


def expected_gammas():
    """With independent draws, and with one sign for all examples."""
    _, _, below, head = captured()
    jacobian = jacobian_of_the_net(below, head)
    # Mean squared error over 2 outputs has the root `sqrt(2 / 2)`, and each of the T
    # positions counts 1 / T.
    jacobian = jacobian / np.sqrt(POSITIONS)
    independent = sum(gamma_of(jacobian[index]) for index in np.ndindex(EXAMPLES, POSITIONS, 2))
    together = sum(
        gamma_of(jacobian[:, position, channel].sum(0))
        for position, channel in np.ndindex(POSITIONS, 2)
    )
    return independent, together


def draws_of(fisher, count):
    """Gammas of the layer below for several seeds, `(count, 3, 3)`."""
    capture, outputs, *_ = captured()
    terms = loss_terms(compile_loss("mse"), tf.constant(Y), outputs)
    (key, record), *_ = capture.records.items()
    layouts = {key: KroneckerLayout(record.linear_map, record.matrix.bias is not None)}
    sample = ExampleSubset(tf.constant(EXAMPLES))
    return np.stack(
        [
            measure(
                capture,
                output_derivatives(terms, fisher, tf.constant([number, 5], tf.int64)),
                sample,
                layouts,
            )
            .moments[key][1][0]
            .numpy()
            for number in range(count)
        ]
    )


@pytest.mark.nightly
@pytest.mark.parametrize("fisher, count", few([("exact", 60), ("sampled", 400)], 1))
def test_exact_is_the_mean_of_sampled(fisher, count):
    independent, together = expected_gammas()
    draws = draws_of(fisher, count)
    error = draws.std(0) / np.sqrt(count)
    assert np.all(np.abs(draws.mean(0) - independent) < 5 * error)
    traces = np.trace(draws, axis1=1, axis2=2)
    assert abs(traces.mean() - np.trace(independent)) < 4 * traces.std() / np.sqrt(count)
    # Negative control: with one sign for all examples the same comparison fails.
    assert abs(traces.mean() - np.trace(together)) > 10 * traces.std() / np.sqrt(count)
    assert np.trace(together) < 0.7 * np.trace(independent)


def test_signs_square_away_without_a_batch_normalisation():
    keras.utils.set_random_seed(3)
    layer = keras_kfc.layers.Dense(CHANNELS, use_bias=False)
    head = keras.layers.Dense(2, use_bias=False)
    with keras_kfc.Capture() as capture:
        outputs = head(tf.tanh(layer(X)))
    terms = loss_terms(compile_loss("mse"), tf.constant(Y), outputs)
    (key, record), *_ = capture.records.items()
    layouts = {key: KroneckerLayout(record.linear_map, record.matrix.bias is not None)}
    gammas = [
        measure(
            capture,
            output_derivatives(terms, "exact", tf.constant([number, 5], tf.int64)),
            ExampleSubset(tf.constant(EXAMPLES)),
            layouts,
        )
        .moments[key][1][0]
        .numpy()
        for number in range(3)
    ]
    hidden = np.tanh(X @ layer.kernel.numpy())
    back = (1 - hidden**2)[..., None] * head.kernel.numpy() / np.sqrt(POSITIONS)
    expected = sum(gamma_of(back[..., channel]) for channel in range(2))
    for gamma in gammas:
        assert relative_error(gamma, expected) < 1e-12
    np.testing.assert_array_equal(gammas[0], gammas[1])
