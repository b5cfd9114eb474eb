"""The diagonal structure against explicit derivatives of single examples."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_kfc
from conftest import relative_error
from keras_kfc.curvature import diagonal
from keras_kfc.curvature.diagonal import DiagonalLayout
from keras_kfc.maps.conv import Conv2DMap
from keras_kfc.maps.dense import DenseMap


def squares_of_examples(layer, inputs, weights_of_outputs):
    """`E[D_b²]` of a layer's kernel and bias by automatic differentiation, example by example."""
    variables = [layer.kernel.value] + ([layer.bias.value] if layer.use_bias else [])
    totals = None
    for example in range(len(inputs)):
        with tf.GradientTape() as tape:
            outputs = layer(inputs[example : example + 1])
            loss = tf.reduce_sum(outputs * weights_of_outputs[example : example + 1])
        gradients = tape.gradient(loss, variables)
        squares = [gradient.numpy() ** 2 for gradient in gradients]
        totals = (
            squares if totals is None else [t + s for t, s in zip(totals, squares, strict=True)]
        )
    means = [total / len(inputs) for total in totals]
    bias = tf.constant(means[1]) if layer.use_bias else None
    return layer.linear_map.stack_bias(tf.constant(means[0]), bias).numpy()


def slow(value):
    return pytest.param(value, marks=pytest.mark.nightly)


LAYERS = [
    (lambda **kw: keras_kfc.layers.Dense(3, **kw), (4,)),
    (lambda **kw: keras_kfc.layers.Dense(3, **kw), (5, 4)),
    (lambda **kw: keras_kfc.layers.Conv2D(4, (3, 2), padding="same", strides=2, **kw), (6, 5, 3)),
    (lambda **kw: keras_kfc.layers.Conv2D(4, 2, groups=2, **kw), (5, 4, 6)),
    (lambda **kw: keras_kfc.layers.Conv1D(4, 3, padding="causal", **kw), (6, 2)),
]


@pytest.mark.parametrize("use_bias", [True, pytest.param(False, marks=pytest.mark.nightly)])
@pytest.mark.parametrize(("make", "shape"), LAYERS)
@pytest.mark.parametrize("slice_bytes", [*map(slow, (2**27, 1)), 3000])
def test_diagonal_is_the_mean_square_of_derivatives(
    make, shape, use_bias, slice_bytes, monkeypatch
):
    monkeypatch.setattr(diagonal, "_SLICE_BYTES", slice_bytes)
    keras.utils.set_random_seed(2)
    rng = np.random.default_rng(0)
    layer = make(use_bias=use_bias, dtype="float64")
    inputs = tf.constant(rng.normal(size=(7, *shape)))
    weights = tf.constant(rng.normal(size=layer(inputs).shape))
    layout = DiagonalLayout(layer.linear_map, use_bias)
    (measured,) = layout.from_pass([inputs], [weights], tf.constant(7), [None])
    expected = squares_of_examples(layer, inputs, weights)
    assert relative_error(measured, expected) < 1e-12
    # Negative control: derivatives of other examples give another diagonal.
    (other,) = layout.from_pass([inputs], [weights[::-1]], tf.constant(7), [None])
    assert relative_error(other, expected) > 0.05


@pytest.mark.parametrize("jit_compile", [False, True])
def test_a_graph_of_unknown_batch_size_says_the_same(jit_compile):
    rng = np.random.default_rng(0)
    layout = DiagonalLayout(Conv2DMap((2, 2), 3, 4), True)
    inputs, weights = rng.normal(size=(6, 4, 5, 3)), rng.normal(size=(6, 3, 4, 4))
    signature = [tf.TensorSpec((None, *a.shape[1:]), tf.float64) for a in (inputs, weights)]

    @tf.function(
        autograph=False,
        jit_compile=jit_compile,
        input_signature=None if jit_compile else signature,
    )
    def measure(a, ds):
        return layout.from_pass([a], [ds], tf.shape(a)[0], [None])[0]

    (eager,) = layout.from_pass([tf.constant(inputs)], [tf.constant(weights)], 6, [None])
    measured = measure(tf.constant(inputs), tf.constant(weights))
    np.testing.assert_allclose(measured, eager, rtol=1e-12)


def test_positions_that_a_mask_leaves_out_do_not_count():
    rng = np.random.default_rng(0)
    layout = DiagonalLayout(DenseMap(4, 3), True)
    inputs, weights = rng.normal(size=(6, 5, 4)), rng.normal(size=(6, 5, 3))
    mask = rng.random((6, 5)) < 0.6
    arguments = [tf.constant(inputs)], [tf.constant(weights)], tf.constant(6)
    (measured,) = layout.from_pass(*arguments, [tf.constant(mask)])
    rows = np.concatenate([inputs, np.ones((6, 5, 1))], 2)
    expected = np.einsum("bt,bti,btj->bij", mask, rows, weights) ** 2
    np.testing.assert_allclose(measured[0], expected.mean(0), rtol=1e-12)


@pytest.mark.parametrize("relative", [True, False])
def test_inverse_is_that_of_the_damped_diagonal(relative):
    keras.utils.set_random_seed(1)
    model = keras_kfc.instrument(
        keras.Sequential([keras.Input((4,)), keras.layers.Dense(3), keras.layers.Dense(2)])
    )
    damping = 0.3
    optimizer = keras_kfc.KFC(
        structure="diagonal", damping=damping, relative_damping=relative, fisher="exact", seed=0
    )
    model.compile(optimizer, "mse")
    rng = np.random.default_rng(0)
    model.train_on_batch(rng.normal(size=(8, 4)), rng.normal(size=(8, 2)))
    for block in optimizer.blocks:
        values = block.state["diagonal"].numpy()
        shift = damping * values.mean() if relative else damping
        inverse = block.state["diagonal_inverse"].numpy()
        np.testing.assert_allclose(inverse, 1 / (values + shift), rtol=1e-5)
        ones = np.ones_like(values)
        np.testing.assert_allclose(block.multiply(ones), inverse)


def test_a_dead_layer_is_damped_as_the_network():
    blocks = [[[4.0, 2.0]], [[0.0, 0.0]]]
    inverses = [
        diagonal.damped_inverse_of_diagonal(tf.constant([b]), tf.constant(0.5), tf.constant(3.0))
        for b in blocks
    ]
    np.testing.assert_allclose(inverses[0], [[[1 / 5.5, 1 / 3.5]]])
    np.testing.assert_allclose(inverses[1], [[[1 / 1.5, 1 / 1.5]]])


def test_weights_without_a_derivative_can_be_inverted_without_damping():
    values = tf.constant([[[4.0, 0.0]]])
    inverse = diagonal.damped_inverse_of_diagonal(
        values, tf.constant(0.0), tf.constant(3.0)
    ).numpy()
    assert inverse[0, 0, 0] == pytest.approx(1 / 4, rel=1e-5)
    assert np.isfinite(inverse[0, 0, 1]) and inverse[0, 0, 1] > 1e4


def test_exact_passes_give_the_diagonal_of_the_gauss_newton_matrix():
    """All passes summed, by an explicit Jacobian: squared error, so `2/d JᵀJ`, mean over batch."""
    keras.utils.set_random_seed(1)
    model = keras_kfc.instrument(
        keras.Sequential(
            [keras.Input((4,)), keras.layers.Dense(3, activation="tanh"), keras.layers.Dense(2)]
        )
    )
    optimizer = keras_kfc.KFC(structure="diagonal", fisher="exact", learning_rate=0.0, seed=0)
    model.compile(optimizer, "mse")
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(8, 4)).astype("float32"), rng.normal(size=(8, 2))
    first = model.layers[0]
    with tf.GradientTape() as tape:
        outputs = model(x)
    jacobian = tape.jacobian(outputs, [first.kernel.value, first.bias.value])
    model.train_on_batch(x, y)
    kernel, bias = (np.sum(part.numpy() ** 2, axis=(0, 1)) / 8 for part in jacobian)
    (block, _) = optimizer.blocks
    measured = block.state["diagonal"].numpy()[0]
    np.testing.assert_allclose(measured, np.vstack([kernel, bias]), rtol=1e-4)


def test_a_cell_of_memory_usage_and_the_monitor_know_it():
    model = keras_kfc.instrument(keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)]))
    optimizer = keras_kfc.KFC(structure="diagonal")
    usage = optimizer.memory_usage(model.trainable_variables)
    assert usage.entries[0].shapes == {"diagonal": (1, 5, 2)}
    assert usage.entries[0].inverses == 40
    model.compile(optimizer, "mse")
    x = np.random.default_rng(0).normal(size=(32, 4))
    monitor = keras_kfc.monitor.CurvatureMonitor("extremes")
    history = model.fit(x, x[:, :2], verbose=0, callbacks=[monitor]).history
    assert history["sequential/dense/diagonal_condition"][0] > 1
    assert keras_kfc.monitor.draw_factors(model, "unused") == []
