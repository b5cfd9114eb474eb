"""The scale of every supported loss against its generalised Gauss-Newton matrix.

The matrix is computed by automatic differentiation of the compiled Keras loss
(explicit Jacobians and Hessians, float64). A one-layer network with one example, or
whose examples share one input, makes the Kronecker block exact, so that
`omega ⊗ gamma` must equal it to rounding, constants included.
"""

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import few

import keras_kfc
from conftest import explicit_ggn, relative_error
from keras_kfc.losses.derivatives import output_derivatives
from keras_kfc.losses.families import family_of
from keras_kfc.losses.likelihood import Likelihood
from keras_kfc.losses.terms import LossTerm


def block_and_ggn(loss, targets, *, activation=None, units=3, shape=(4,), weights=None, **compiled):
    """The Kronecker block of a Dense output layer, and the explicit matrix."""
    keras.config.set_floatx("float64")
    keras.utils.set_random_seed(2)
    examples = len(targets)
    row = np.random.default_rng(0).normal(size=(1, *shape))
    inputs = np.repeat(row, examples, axis=0)
    model = keras_kfc.instrument(
        keras.Sequential([keras.Input(shape), keras.layers.Dense(units, activation=activation)])
    )
    optimizer = keras_kfc.KFC(fisher="exact", curvature_update_period=1, weight_sharing="expand")
    # One step: tracing it would take longer.
    model.compile(optimizer=optimizer, loss=loss, run_eagerly=True, **compiled)
    layer = model.layers[-1]
    variables = [layer.kernel, layer.bias]

    def loss_of_logits(logits):
        outputs = logits if activation is None else keras.activations.get(activation)(logits)
        return model.compute_loss(y=targets, y_pred=outputs, sample_weight=weights)

    linear = keras.layers.Dense(units)
    linear.build((None, *shape))
    linear.set_weights(layer.get_weights())
    expected = explicit_ggn(
        linear, tf.constant(inputs), [linear.kernel.value, linear.bias.value], loss_of_logits
    )
    model.train_on_batch(inputs, targets, sample_weight=weights)
    block = optimizer.blocks[0]
    assert len(variables) == 2 and block.omega.dtype == "float64"
    return np.kron(block.omega[0], block.gamma[0]), expected


LABELS = np.array([0, 2, 1, 2, 0])
ONE_HOT = np.eye(3)[LABELS]
BINARY = np.array([[0, 1, 1], [1, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0]], "float64")
REAL = np.random.default_rng(5).normal(size=(5, 3))
WEIGHTS = np.array([0.5, 2.0, 0.0, 1.5, 3.0])
losses = keras.losses

CASES = {
    "sparse logits": (losses.SparseCategoricalCrossentropy(from_logits=True), LABELS, {}),
    "sparse probabilities": ("sparse_categorical_crossentropy", LABELS, {"activation": "softmax"}),
    "sparse column": (
        "sparse_categorical_crossentropy",
        LABELS[:, None],
        {"activation": "softmax"},
    ),
    "categorical": ("categorical_crossentropy", ONE_HOT, {"activation": "softmax"}),
    "generic name": ("crossentropy", ONE_HOT, {"activation": "softmax"}),
    "label smoothing": (
        losses.CategoricalCrossentropy(from_logits=True, label_smoothing=0.3),
        ONE_HOT,
        {},
    ),
    "binary logits": (losses.BinaryCrossentropy(from_logits=True), BINARY, {}),
    "binary probabilities": ("binary_crossentropy", BINARY, {"activation": "sigmoid"}),
    "binary smoothing": (
        losses.BinaryCrossentropy(label_smoothing=0.2),
        BINARY,
        {"activation": "sigmoid"},
    ),
    "squared": ("mse", REAL, {}),
    "squared function": (losses.mean_squared_error, REAL, {}),
    "one output": ("mse", REAL[:, 0], {"units": 1}),
    "sum": (losses.MeanSquaredError(reduction="sum"), REAL, {}),
    "sample weights": ("mse", REAL, {"weights": WEIGHTS}),
    "weighted crossentropy": (
        "sparse_categorical_crossentropy",
        LABELS,
        {"activation": "softmax", "weights": WEIGHTS},
    ),
    "weighted mean": (
        losses.MeanSquaredError(reduction="mean_with_sample_weight"),
        REAL,
        {"weights": WEIGHTS},
    ),
    "loss weight": ("mse", REAL, {"loss_weights": 7.0}),
}


@pytest.mark.parametrize("case", few(CASES, 8))
def test_block_equals_the_gauss_newton_matrix(case):
    loss, targets, options = CASES[case]
    block, expected = block_and_ggn(loss, targets, **options)
    assert relative_error(block, expected) < 1e-6


def test_wrong_scale_would_show():
    """Negative control: the sum over outputs, a known trap, fails the same comparison."""
    block, expected = block_and_ggn("mse", REAL)
    assert relative_error(3 * block, expected) > 1


@pytest.mark.parametrize(
    "case", ["squared", "sparse probabilities", "binary logits", "sample weights"]
)
def test_sampled_has_the_exact_block_as_its_mean(case):
    """Many draws of one example average to the Gauss-Newton matrix."""
    loss, targets, options = CASES[case]
    options = {key: value for key, value in options.items() if key != "weights"}
    keras.utils.set_random_seed(2)
    copies = 4000
    model = keras.Sequential(
        [keras.Input((4,)), keras.layers.Dense(3, activation=options.get("activation"))]
    )
    inputs = np.repeat(np.random.default_rng(0).normal(size=(1, 4)), copies, axis=0)
    repeated = np.repeat(targets[:1], copies, axis=0)
    arguments = {"loss": loss, "batch_size": copies, "seed": 3}
    sampled, exact = (
        next(
            iter(
                keras_kfc.kronecker_factors(
                    model, inputs, repeated, fisher=fisher, **arguments
                ).values()
            )
        )
        for fisher in ("sampled", "exact")
    )
    assert relative_error(sampled.gamma, exact.gamma) < 0.1


def test_positions_of_an_example_are_independent_draws():
    """Per-position losses: with identity weights the matrix over the logits is checked whole."""
    keras.config.set_floatx("float64")
    logits = np.random.default_rng(0).normal(size=(2, 4, 3))
    labels = np.random.default_rng(1).integers(0, 3, size=(2, 4))
    model = keras.Sequential([keras.Input((4, 3)), keras.layers.Dense(3, use_bias=False)])
    model.layers[0].set_weights([np.eye(3)])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    factors = keras_kfc.kronecker_factors(model, logits, labels, loss=loss, fisher="exact")
    gamma = next(iter(factors.values())).gamma
    point = tf.constant(logits)
    with tf.GradientTape(persistent=True) as outer:
        outer.watch(point)
        with tf.GradientTape() as inner:
            inner.watch(point)
            value = loss(labels, point)
        gradient = inner.gradient(value, point)
    hessian = outer.jacobian(gradient, point, experimental_use_pfor=False).numpy()
    blocks = sum(hessian[b, t, :, b, t, :] for b in range(2) for t in range(4))
    # gamma is a mean over 4 positions, the mean loss a sum over 8 elements of weight 1/8.
    assert relative_error(4 * gamma, blocks) < 1e-6


def test_masked_and_ignored_positions_do_not_count():
    keras.config.set_floatx("float64")
    logits = np.random.default_rng(0).normal(size=(2, 4, 3))
    labels = np.array([[0, 255, 2, 1], [255, 255, 1, 0]])
    model = keras.Sequential([keras.Input((4, 3)), keras.layers.Dense(3, use_bias=False)])
    model.layers[0].set_weights([np.eye(3)])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=255)
    factors = keras_kfc.kronecker_factors(model, logits, labels, loss=loss, fisher="exact")
    gamma = next(iter(factors.values())).gamma
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    expected = 0.0
    for p in probabilities[labels != 255]:
        expected = expected + (np.diag(p) - np.outer(p, p)) / 5
    # Five elements count, each with 1/5; gamma divides by all 4 positions.
    assert relative_error(4 * gamma, expected) < 1e-6
    with pytest.raises(ValueError, match="ignore_class"):
        keras_kfc.kronecker_factors(model, logits, loss=loss, fisher="exact")


def test_several_outputs_add_up_with_their_loss_weights():
    keras.config.set_floatx("float64")
    keras.utils.set_random_seed(2)
    inputs = keras.Input((4,))
    hidden = keras_kfc.layers.Dense(3, name="hidden")(inputs)
    outputs = {
        "label": keras_kfc.layers.Dense(3, activation="softmax", name="label")(hidden),
        "size": keras_kfc.layers.Dense(2, name="size")(hidden),
    }
    model = keras.Model(inputs, outputs)
    optimizer = keras_kfc.KFC(fisher="exact", curvature_update_period=1, weight_sharing="expand")
    weights = {"label": 0.3, "size": 5.0}
    model.compile(
        optimizer=optimizer,
        loss={"label": "sparse_categorical_crossentropy", "size": "mse"},
        loss_weights=weights,
        run_eagerly=True,
    )
    x = np.repeat(np.random.default_rng(0).normal(size=(1, 4)), 3, axis=0)
    y = {"label": np.array([0, 1, 2]), "size": np.ones((3, 2))}
    label, size = (model.get_layer(name).kernel.numpy() for name in ("label", "size"))
    p = model.predict(x, verbose=0)["label"][0]
    expected = 0.3 * label @ (np.diag(p) - np.outer(p, p)) @ label.T + 5.0 * size @ size.T
    model.train_on_batch(x, y)
    gammas = {block.path.split("/")[-1]: block.gamma[0].numpy() for block in optimizer.blocks}
    assert relative_error(gammas["hidden"], expected) < 1e-6
    assert relative_error(gammas["size"], 5.0 * np.eye(2)) < 1e-6


@pytest.mark.parametrize("from_logits", [True, False])
def test_classes_on_another_axis(from_logits):
    rng = np.random.default_rng(0)
    last = rng.normal(size=(2, 5, 3)).astype("float32")
    if not from_logits:
        last = np.exp(last) / np.exp(last).sum(-1, keepdims=True)
    seed = tf.constant([1, 2], tf.int64)
    derivatives = {}
    for axis, outputs in ((-1, last), (1, last.transpose(0, 2, 1))):
        loss = keras.losses.CategoricalCrossentropy(from_logits=from_logits, axis=axis)
        term = LossTerm(loss, tf.zeros(outputs.shape), tf.constant(outputs))
        derivatives[axis] = family_of(term).part.sample(seed)[0].numpy()
    np.testing.assert_allclose(derivatives[1], derivatives[-1].transpose(0, 2, 1), rtol=1e-6)


def test_a_subclass_of_a_known_loss_is_not_taken_for_it():
    class Tenfold(keras.losses.MeanSquaredError):
        def call(self, y_true, y_pred):
            return 10 * super().call(y_true, y_pred)

    outputs = tf.ones((2, 3))
    assert not isinstance(family_of(LossTerm(Tenfold(), outputs, outputs)).part, Likelihood)
    known = family_of(LossTerm(keras.losses.MeanSquaredError(), outputs, outputs))
    assert isinstance(known.part, Likelihood)
    (tenfold, plain) = (
        family_of(LossTerm(loss, 0 * outputs, outputs)).part.column(tf.constant(0))[0]
        for loss in (Tenfold(), keras.losses.MeanSquaredError())
    )
    np.testing.assert_allclose(tenfold, np.sqrt(10) * plain, rtol=1e-5)


def test_draws_of_a_step_do_not_return_in_another_output_of_the_next():
    terms = [LossTerm(keras.losses.MeanSquaredError(), None, tf.ones((4, 3))) for _ in range(2)]
    draws = [
        output_derivatives(terms, "sampled", tf.constant([5, step], tf.int64)).derivatives(0)
        for step in range(2)
    ]
    flat = [tensor.numpy().tobytes() for pair in draws for tensor in pair]
    assert len(set(flat)) == 4


def test_other_losses_train_with_the_empirical_fisher():
    model = keras.Sequential([keras.Input((4,)), keras_kfc.layers.Dense(2)])
    model.compile(optimizer=keras_kfc.KFC(fisher="empirical"), loss="huber")
    x = np.random.default_rng(0).normal(size=(64, 4))
    history = model.fit(x, x[:, :2], epochs=20, verbose=0)
    assert history.history["loss"][-1] < 0.5 * history.history["loss"][0]


def test_empirical_weights_scale_one_examples_derivative_by_the_root():
    keras.config.set_floatx("float64")
    model = keras.Sequential([keras.Input((4,)), keras_kfc.layers.Dense(3)])
    optimizer = keras_kfc.KFC(fisher="empirical", weight_sharing="expand")
    model.compile(optimizer=optimizer, loss="mse")
    x = np.random.default_rng(0).normal(size=(5, 4))
    residual = model.predict(x, verbose=0) - REAL
    model.train_on_batch(x, REAL, sample_weight=WEIGHTS)
    derivatives = np.sqrt(WEIGHTS)[:, None] * 2 / 3 * residual
    expected = derivatives.T @ derivatives / 5
    assert relative_error(optimizer.blocks[0].gamma[0], expected) < 1e-10
