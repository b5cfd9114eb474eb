"""Tables of rows: counts of tokens, rows that stay as they are, tied output projections."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import few

import keras_kfc
from conftest import relative_error

TOKENS, WIDTH, LENGTH = 12, 3, 5
RNG = np.random.default_rng(0)
X = RNG.integers(1, 9, (6, LENGTH))


def bag(mask_zero=False, dtype="float64"):
    keras.utils.set_random_seed(1)
    inputs = keras.Input((LENGTH,), dtype="int32")
    table = keras.layers.Embedding(TOKENS, WIDTH, mask_zero=mask_zero, dtype=dtype)
    hidden = keras.layers.GlobalAveragePooling1D(dtype=dtype)(table(inputs))
    outputs = keras.layers.Dense(2, dtype=dtype)(hidden)
    return keras_kfc.instrument(keras.Model(inputs, outputs))


def tied(dtype="float64", cap=None):
    keras.utils.set_random_seed(1)
    inputs = keras.Input((LENGTH,), dtype="int32")
    options = {"dtype": dtype, "logit_soft_cap": cap}
    table = keras.layers.ReversibleEmbedding(TOKENS, WIDTH, **options)
    outputs = table(keras.layers.Dense(WIDTH, "tanh", dtype=dtype)(table(inputs)), reverse=True)
    return keras_kfc.instrument(keras.Model(inputs, outputs))


def trained_once(model, x, y, loss="mse", **options):
    model.compile(keras_kfc.KFC(seed=1, **options), loss)
    before = model.layers[1].get_weights()[0]
    model.train_on_batch(x, y)
    return model.optimizer, before, model.layers[1].get_weights()[0]


@pytest.mark.parametrize("mask_zero", few([True, False], 1))
def test_omega_counts_tokens(mask_zero):
    x = X * (np.arange(LENGTH) < RNG.integers(2, 6, (6, 1)))
    optimizer, *_ = trained_once(bag(mask_zero), x, np.zeros((6, 2)))
    counts = np.bincount(x.ravel(), minlength=TOKENS) / 6
    if mask_zero:
        counts[0] = 0
    np.testing.assert_allclose(optimizer.blocks[0].counts, counts, rtol=1e-6)


def test_a_step_is_that_of_the_whole_kronecker_product():
    """The damped inverse from explicit matrices, with unit vectors as inputs."""
    model = bag()
    y = RNG.normal(size=(6, 2))
    with tf.GradientTape() as tape:
        loss = tf.reduce_mean((model(X) - y) ** 2)
    gradient = tf.convert_to_tensor(tape.gradient(loss, model.trainable_variables[0].value))
    settings = {"damping": 0.3, "momentum": 0.0, "weight_decay": None, "polyak_scaling": None}
    optimizer, before, after = trained_once(model, X, y, fisher="exact", **settings)
    block = optimizer.blocks[0]
    hot = np.eye(TOKENS)[X].reshape(-1, TOKENS)
    omega, gamma = hot.T @ hot / 6, block.gamma.numpy()[0]
    pi2 = (np.trace(omega) / TOKENS) / (np.trace(gamma) / WIDTH)
    damping = 0.3 * np.trace(omega) / TOKENS * np.trace(gamma) / WIDTH
    shifts = np.sqrt(pi2 * damping), np.sqrt(damping / pi2)
    expected = np.linalg.solve(omega + shifts[0] * np.eye(TOKENS), gradient)
    expected = expected @ np.linalg.inv(gamma + shifts[1] * np.eye(WIDTH))
    assert relative_error((before - after) / 0.03, expected) < 1e-6


def test_gamma_is_that_of_the_outputs_of_the_table():
    """Mean squared error over two outputs has the identity as its Fisher matrix."""
    model = bag()
    optimizer, *_ = trained_once(model, X, np.zeros((6, 2)), fisher="exact", learning_rate=0.0)
    # s, its mean over 5 positions, 2 outputs.
    ds = model.layers[-1].get_weights()[0] / LENGTH
    assert relative_error(optimizer.blocks[0].gamma[0], ds @ ds.T) < 1e-6


@pytest.mark.parametrize("clipnorm", few([None, 1e6], 1))
def test_rows_that_no_batch_used_stay_as_they_are(clipnorm):
    """Also where clipping makes the gradient a dense one; so do their momenta."""
    model = bag(dtype="float32")
    model.compile(keras_kfc.KFC(seed=1, clipnorm=clipnorm), "mse")
    y = RNG.normal(size=(6, 2)).astype("float32")
    before = model.get_weights()[0]
    model.train_on_batch(X, y)
    first = model.get_weights()[0]
    used = np.unique(X)
    others = np.setdiff1d(np.arange(TOKENS), used)
    np.testing.assert_array_equal(first[others], before[others])
    assert (np.abs(first - before)[used].max(1) > 0).all()
    # A second batch without token 8: it has a momentum by now.
    again = np.where(X == 8, 1, X)
    model.train_on_batch(again, y)
    second = model.get_weights()[0]
    np.testing.assert_array_equal(second[8], first[8])
    assert np.abs(second - first)[1].max() > 0


@pytest.mark.nightly
def test_sparse_and_dense_gradients_take_the_same_steps():
    weights = []
    for clipnorm in (None, 1e6):
        model = bag()
        model.compile(keras_kfc.KFC(seed=1, clipnorm=clipnorm, weight_decay=None), "mse")
        y = np.random.default_rng(3).normal(size=(6, 2))
        for _ in range(4):
            model.train_on_batch(X, y)
        weights.append(np.concatenate([w.ravel() for w in model.get_weights()]))
    assert relative_error(*weights) < 1e-6


def test_a_tied_table_has_factors_of_both_uses():
    model = tied()
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    start = model.get_weights()
    hidden = np.tanh(start[0][X] @ start[1] + start[2])
    logits = hidden @ start[0].T
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    optimizer, *_ = trained_once(model, X, X, loss, fisher="exact")
    (block, _) = optimizer.blocks
    assert block.path.endswith("reversible_embedding")
    rows = hidden.reshape(-1, WIDTH)
    assert relative_error(block.hidden[0], rows.T @ rows / len(rows)) < 1e-6
    # The Fisher matrix of a softmax's logits has p (1 - p) on its diagonal; each example's loss is
    # a mean over its positions.
    expected = (p * (1 - p)).sum(1).mean(0) / LENGTH
    assert relative_error(block.output_squares, expected) < 1e-5
    np.testing.assert_allclose(block.counts, np.bincount(X.ravel(), minlength=TOKENS) / 6)


@pytest.mark.slow
def test_the_product_for_both_uses_has_the_least_additional_trace():
    block = trained_once(tied(), X, X % 2, keras.losses.SparseCategoricalCrossentropy(True))[
        0
    ].blocks[0]
    rows, columns = (float(tf.reduce_sum(part)) for part in (block.counts, block.output_squares))
    gamma, hidden = (float(tf.linalg.trace(part)[0]) for part in (block.gamma, block.hidden))

    def trace(scale):
        return (rows + columns / scale) * (gamma + scale * hidden)

    combined = block.combined()
    found = float(tf.reduce_sum(combined[0]) * tf.linalg.trace(combined[1])[0])
    scales = np.geomspace(1e-6, 1e6, 2001)
    assert found == pytest.approx(min(map(trace, scales)), rel=1e-3)
    assert found < 0.9 * max(trace(0.1), trace(10.0))


@pytest.mark.parametrize("cap", few([5.0, None], 1))
@pytest.mark.slow
def test_a_tied_model_computes_as_keras_and_trains(cap):
    model = tied("float32", cap)
    outputs = model(X).numpy()
    with keras_kfc.Capture():
        np.testing.assert_array_equal(model(X), outputs)
    np.testing.assert_array_equal(keras_kfc.strip(model)(X), outputs)
    keras_kfc.instrument(model)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras_kfc.KFC(seed=1), loss)
    losses = model.fit(X, X, batch_size=3, epochs=40, verbose=0).history["loss"]
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.slow
def test_untied_tables_have_two_blocks():
    keras.utils.set_random_seed(1)
    inputs = keras.Input((LENGTH,), dtype="int32")
    table = keras.layers.ReversibleEmbedding(TOKENS, WIDTH, tie_weights=False)
    model = keras_kfc.instrument(keras.Model(inputs, table(table(inputs), reverse=True)))
    model.compile(keras_kfc.KFC(), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    model.fit(X, X, verbose=0)
    names = [block.path.split("/")[-1] for block in model.optimizer.blocks]
    assert names == ["embeddings", "reverse_embeddings"]


def test_a_subclass_of_another_library_that_adds_nothing_is_instrumented():
    """As keras_hub has them; a user's own keeps its class."""
    hub = type("ReversibleEmbedding", (keras.layers.ReversibleEmbedding,), {})
    hub.__module__ = "keras_hub.src.layers"
    own = type("Own", (keras.layers.Embedding,), {})
    inputs = keras.Input((LENGTH,), dtype="int32")
    tables = [hub(TOKENS, WIDTH), own(TOKENS, WIDTH)]
    model = keras.Model(inputs, [table(inputs) for table in tables])
    keras_kfc.instrument(model)
    kinds = [keras_kfc.layers.ReversibleEmbedding, own]
    assert [type(table) for table in tables] == kinds
    keras_kfc.strip(model)
    assert [type(table) for table in tables] == [hub, own]


@pytest.mark.nightly
def test_a_model_with_tables_is_watched_drawn_and_analysed(tmp_path):
    """Blocks of all structures: their spectra are logged, their matrices drawn."""
    model = tied("float32")
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras_kfc.KFC(seed=1), loss)
    monitor = keras_kfc.monitor.CurvatureMonitor(spectrum="extremes")
    history = model.fit(X, X, epochs=2, verbose=0, callbacks=[monitor]).history
    conditions = [name for name in history if name.endswith("_condition")]
    assert {name.split("/")[-1] for name in conditions} == {
        *("counts_condition", "gamma_condition", "omega_condition")
    }
    assert all(history[name][-1] >= 1 for name in conditions)
    files = keras_kfc.monitor.draw_factors(model, tmp_path)
    assert len(files) == 2
    factors = keras_kfc.kronecker_factors(model, X, X, loss=loss)
    assert [path.split("/")[-1] for path in factors] == ["dense"]
