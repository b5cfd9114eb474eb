"""Recurrent layers: the loop over time with a capture, and the factors of what runs in it."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import few
from keras import layers

import keras_kfc
from conftest import relative_error

RNG = np.random.default_rng(0)
B, T, J, H = 4, 5, 3, 2
X = RNG.normal(size=(B, T, J))
MASK = np.arange(T) < np.array([[5], [3], [1], [4]])
KINDS = {
    "SimpleRNN": lambda **options: layers.SimpleRNN(H, **options),
    "LSTM": lambda **options: layers.LSTM(H, **options),
    "GRU": lambda **options: layers.GRU(H, **options),
    "GRU, reset before": lambda **options: layers.GRU(H, reset_after=False, **options),
    "stacked": lambda **options: layers.RNN([layers.GRUCell(3), layers.LSTMCell(H)], **options),
}
OPTIONS = [
    {},
    {"return_sequences": True, "go_backwards": True},
    {"unroll": True},
    {"return_state": True},
    {"return_sequences": True, "zero_output_for_mask": True},
]


def model_of(kind, masked=False, **options):
    keras.utils.set_random_seed(1)
    keras.config.set_dtype_policy("float64")
    try:
        inputs = keras.Input((T, J), dtype="float64")
        hidden = layers.Masking(-7.0)(inputs) if masked else inputs
        outputs = KINDS[kind](**options)(hidden)
        model = keras.Model(inputs, outputs)
    finally:
        keras.config.set_dtype_policy("float32")
    for variable in model.trainable_variables:
        variable.assign(RNG.normal(size=variable.shape))
    return model


def masked_inputs():
    return np.where(MASK[..., None], X, -7.0)


def run(model, x, capture):
    """Outputs and gradients, with a capture or without."""
    with tf.GradientTape() as tape:
        if capture:
            with keras_kfc.Capture() as seen:
                outputs = keras.tree.flatten(model(x, training=True))
            assert seen.records
        else:
            outputs = keras.tree.flatten(model(x, training=True))
        loss = tf.add_n([tf.reduce_sum(tf.sin(part)) for part in outputs])
    gradients = tape.gradient(loss, [variable.value for variable in model.trainable_variables])
    return [*outputs, *gradients]


@pytest.mark.parametrize("kind", few(KINDS, 2))
@pytest.mark.parametrize("masked", few([True, False], 1))
@pytest.mark.parametrize("options", few(OPTIONS[1:] + OPTIONS[:1], 1), ids=str)
def test_the_loop_of_a_capture_is_keras_own(kind, options, masked):
    """Outputs, states and gradients, whatever the order of time, masks and unrolling."""
    model = model_of(kind, masked, **options)
    x = masked_inputs() if masked else X
    plain = run(model, x, False)
    keras_kfc.instrument(model)
    seen = run(model, x, True)
    assert len(plain) == len(seen)
    for one, other in zip(plain, seen, strict=True):
        assert relative_error(one, other) < 1e-12


@pytest.mark.parametrize("static", few([False, True], 1))
def test_a_graph_with_any_number_of_steps_and_examples(static):
    model = keras.Sequential([keras.Input((T if static else None, J)), layers.LSTM(H)])
    keras_kfc.instrument(model)
    shape = (None, T if static else None, J)

    @tf.function(autograph=False, input_signature=[tf.TensorSpec(shape, tf.float32)])
    def derivatives(x):
        with keras_kfc.Capture() as capture:
            loss = tf.reduce_sum(model(x, training=True) ** 2)
        return list(capture.differentiate([loss], [tf.ones_like(loss)]).values())

    for steps in (T,) if static else (T, 2):
        ((of_gates,),) = derivatives(X[:, :steps].astype("float32"))
        assert of_gates.shape == (B, steps, 4 * H)


def by_hand(model, x, backwards=False):
    """Rows of both matrices of an LSTM and the derivatives of its gates, step by step."""
    kernel, recurrent, bias = (w.astype("float64") for w in model.get_weights())
    state, carry = (tf.zeros((B, H), tf.float64) for _ in range(2))
    states, gates = [], []
    with tf.GradientTape() as tape:
        tape.watch([state, carry])
        for step in reversed(range(T)) if backwards else range(T):
            states.append(state)
            pre = tf.constant(x[:, step] @ kernel + bias) + state @ recurrent
            tape.watch(pre)
            gates.append(pre)
            into, forget, new, out = tf.split(pre, 4, axis=1)
            carry = tf.sigmoid(forget) * carry + tf.sigmoid(into) * tf.tanh(new)
            state = tf.sigmoid(out) * tf.tanh(carry)
        loss = tf.reduce_sum(tf.sin(state))
    order = slice(None, None, -1 if backwards else 1)
    return states[order], tape.gradient(loss, gates)[order]


@pytest.mark.parametrize("backwards", [False, True])
def test_what_is_recorded_is_an_lstm_unrolled_by_hand(backwards):
    """Steps of an example follow each other, in the order of time."""
    model = model_of("LSTM", go_backwards=backwards)
    keras_kfc.instrument(model)
    with keras_kfc.Capture() as capture:
        loss = tf.reduce_sum(tf.sin(model(X, training=True)))
    derivatives = capture.differentiate([loss], [tf.ones_like(loss)])
    states, gates = by_hand(model, X, backwards)
    ((key, record),) = capture.records.items()
    (use,), (derivative,) = record.uses, derivatives[key]
    # One matrix sees the inputs and the states before.
    assert relative_error(use.inputs, np.concatenate((X, np.stack(states, 1)), axis=2)) < 1e-12
    assert relative_error(derivative, np.stack(gates, 1)) < 1e-10


def factors_of(model, x):
    y = np.zeros((B, H))
    settings = {"fisher": "empirical", "weight_sharing": "expand", "seed": 1}
    model.compile(keras_kfc.KFC(**settings), "mse")
    model.fit(x, y, batch_size=B, verbose=0)
    return {block.path.split("/")[-1]: block for block in model.optimizer.blocks}


@pytest.mark.nightly
def test_factors_count_the_steps_that_a_mask_leaves():
    model = model_of("LSTM", masked=True)
    start = model.get_weights()
    blocks = factors_of(keras_kfc.instrument(model), masked_inputs())
    model.set_weights(start)
    rows = np.pad(X, ((0, 0), (0, 0), (0, 1)), constant_values=1)[MASK]
    (block,) = blocks.values()
    own = np.r_[: X.shape[2], -1]  # without the states
    assert relative_error(block.omega.numpy()[0][np.ix_(own, own)], rows.T @ rows / B) < 1e-6
    with tf.GradientTape() as tape, keras_kfc.Capture() as capture:
        loss = tf.reduce_mean(model(masked_inputs(), training=True) ** 2)
    tape.gradient(loss, model.trainable_variables[0].value)
    (use,) = next(iter(capture.records.values())).uses
    ds = B * use.derivative.numpy().reshape(B, T, -1)
    assert not ds[~MASK].any()
    expected = ds[MASK].T @ ds[MASK] / MASK.sum()
    assert relative_error(block.gamma[0], expected) < 1e-5


@pytest.mark.parametrize("kind", ["LSTM", "SimpleRNN"])
@pytest.mark.parametrize("masked", few([True, False], 1))
def test_the_block_of_both_kernels_has_the_partial_traces_of_the_fisher_matrix(kind, masked):
    """From the gradient of each example by itself: inputs and states are rows of one matrix."""
    model = model_of(kind, masked)
    x, y = masked_inputs() if masked else X, RNG.normal(size=(B, H))
    each = []
    for b in range(B):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((model(x[b : b + 1], training=True) - y[b]) ** 2)
        gradients = tape.gradient(loss, [v.value for v in model.trainable_variables])
        each.append(np.concatenate([np.atleast_2d(g.numpy()) for g in gradients]))
    keras_kfc.instrument(model)
    model.compile(keras_kfc.KFC(0.0, fisher="empirical", seed=1), "mse")
    model.train_on_batch(x, y)
    (block,) = model.optimizer.blocks
    assert block.indices.kernels == (0, 1) and block.indices.bias == 2
    derivatives = np.stack(each)
    omega = np.einsum("bij,bkj->ik", derivatives, derivatives) / B
    gamma = np.einsum("bji,bjk->ik", derivatives, derivatives) / B
    assert relative_error(block.omega[0], omega) < 1e-6
    assert relative_error(block.gamma[0], gamma) < 1e-6
    # Negative control: kernels apart, inputs and states are uncorrelated.
    states, inputs = np.trace(omega[J : J + H, J : J + H]), np.trace(omega[:J, :J])
    assert np.linalg.norm(omega[:J, J : J + H]) > 0.05 * np.sqrt(states * inputs)


@pytest.mark.nightly
def test_a_bidirectional_layer_trains_both_directions():
    keras.utils.set_random_seed(1)
    model = keras.Sequential(
        [keras.Input((T, J)), layers.Bidirectional(layers.LSTM(H)), layers.Dense(1)]
    )
    keras_kfc.instrument(model).compile(keras_kfc.KFC(seed=1), "mse")
    model.fit(X, X[:, :1, 0], verbose=0)
    paths = [block.path for block in model.optimizer.blocks]
    assert len(paths) == 3 and any("forward" in p for p in paths)
    assert any("backward" in path for path in paths)


@pytest.mark.slow
def test_layers_in_a_cell_of_a_users_own_have_blocks():
    class OwnCell(layers.Layer):
        """A cell made of dense layers."""

        state_size = H

        def __init__(self):
            super().__init__()
            self.inner = layers.Dense(H, name="inner")
            self.outer = layers.Dense(H, "tanh", name="outer")

        def build(self, shape):
            self.inner.build((None, shape[-1] + H))
            self.outer.build((None, H))

        def call(self, inputs, states):
            joined = tf.concat((inputs, states[0]), axis=1)
            output = self.outer(tf.nn.relu(self.inner(joined)))
            return output, [output]

    keras.utils.set_random_seed(1)
    model = keras.Sequential([keras.Input((T, J)), layers.RNN(OwnCell())])
    plain = model(X)
    keras_kfc.instrument(model).compile(keras_kfc.KFC(seed=1), "mse")
    with keras_kfc.Capture():
        np.testing.assert_allclose(model(X), plain, rtol=1e-5)
    model.fit(X, np.zeros((B, H)), verbose=0)
    assert [block.path.split("/")[-1] for block in model.optimizer.blocks] == ["inner", "outer"]
    assert all(float(block.ema_weight) == B for block in model.optimizer.blocks)


@pytest.mark.nightly
@pytest.mark.parametrize("kind", few(["LSTM", "GRU"], 1))
def test_steps_are_the_same_compiled_by_xla(kind):
    weights = []
    first = model_of(kind).get_weights()
    for jit in (False, True):
        model = model_of(kind)
        model.set_weights(first)
        keras_kfc.instrument(model)
        model.compile(keras_kfc.KFC(fisher="exact"), "mse", jit_compile=jit)
        model.fit(X, np.ones((B, H)), epochs=3, verbose=0, shuffle=False)
        weights.append(np.concatenate([w.ravel() for w in model.get_weights()]))
    assert relative_error(*weights) < 1e-5
    assert relative_error(weights[0], np.concatenate([w.ravel() for w in first])) > 1e-3


@pytest.mark.slow
def test_a_layer_inside_time_distributed_has_the_block_of_all_steps():
    keras.utils.set_random_seed(1)
    model = keras.Sequential([keras.Input((T, J)), layers.TimeDistributed(layers.Dense(H))])
    keras_kfc.instrument(model).compile(keras_kfc.KFC(weight_sharing="expand"), "mse")
    model.fit(X, np.zeros((B, T, H)), batch_size=B, verbose=0)
    (block,) = model.optimizer.blocks
    rows = np.pad(X, ((0, 0), (0, 0), (0, 1)), constant_values=1).reshape(B * T, -1)
    assert relative_error(block.omega[0], rows.T @ rows / B) < 1e-6


@pytest.mark.nightly
def test_a_train_step_that_hides_its_loss_gets_the_empirical_factors(caplog):
    """Ordinary backward passes come by the probes, too: the layer keeps its blocks."""

    class Hidden(keras.Model):
        def train_step(self, data):
            x, y = data
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean((self(x, training=True) - y) ** 2)
            variables = self.trainable_variables
            self.optimizer.apply(tape.gradient(loss, variables), variables)
            return {"loss": loss}

    keras.utils.set_random_seed(1)
    inputs = keras.Input((T, J))
    model = Hidden(inputs, layers.LSTM(H)(inputs))
    keras_kfc.instrument(model).compile(keras_kfc.KFC(seed=1))
    model.fit(X, np.ones((B, H)), batch_size=B, epochs=2, verbose=0)
    assert "empirical Fisher matrix" in caplog.text and "fallback rule" not in caplog.text
    assert len(model.optimizer.blocks) == 1
    assert all(np.abs(block.gamma).max() > 0 for block in model.optimizer.blocks)
