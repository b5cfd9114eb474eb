"""The Fisher matrix by products, against explicit Jacobians and Hessians in float64."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import few

import keras_kfc
from conftest import explicit_ggn, relative_error

RNG = np.random.default_rng(0)
LABELS = np.array([0, 2, 1, 1, 0])


class Scaled(keras.layers.Layer):
    """A user's own layer, which has no block."""

    def build(self, shape):
        self.scale = self.add_weight(shape=(shape[-1],), initializer="ones", name="scale")

    def call(self, inputs):
        return keras.ops.sin(self.scale * inputs)


def conv_net():
    return [
        keras.Input((6, 6, 2)),
        keras.layers.Conv2D(3, 3, activation="relu"),
        keras.layers.BatchNormalization(),
        keras.layers.MaxPooling2D(),
        Scaled(),
        keras.layers.Flatten(),
        keras.layers.Dense(3),
    ]


def sequence_net():
    return [
        keras.Input((4,), dtype="int32"),
        keras.layers.Embedding(6, 3),
        keras.layers.LSTM(2),
        keras.layers.Dense(3),
    ]


def attention_net():
    inputs = keras.Input((3, 4))
    attended = keras.layers.MultiHeadAttention(2, 2)(inputs, inputs)
    outputs = keras.layers.LayerNormalization()(attended + inputs)
    return inputs, keras.layers.Dense(3)(keras.layers.Flatten()(outputs))


def model_of(net):
    keras.utils.set_random_seed(1)
    built = net()
    return keras.Model(*built) if isinstance(built, tuple) else keras.Sequential(built)


def inputs_of(model):
    shape = (5, *model.input_shape[1:])
    if "int" in model.inputs[0].dtype:
        return np.random.default_rng(2).integers(0, 6, shape)
    return np.random.default_rng(2).normal(size=shape)


class OwnLoss(keras.losses.Loss):
    """A user's, which is convex in each output."""

    def call(self, y_true, y_pred):
        return keras.ops.mean(keras.ops.softplus(y_pred - y_true), axis=-1)


def sparse():
    """In the float type of now."""
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


CASES = {
    "conv net": (conv_net, sparse, LABELS),
    "squared error": (conv_net, keras.losses.MeanSquaredError, RNG.normal(size=(5, 3))),
    "events": (
        conv_net,
        lambda: keras.losses.BinaryCrossentropy(from_logits=True),
        RNG.integers(0, 2, (5, 3)).astype(float),
    ),
    "a user's own loss": (attention_net, OwnLoss, RNG.normal(size=(5, 3))),
    "recurrent": (sequence_net, sparse, LABELS),
    "attention": (attention_net, sparse, LABELS),
}


@pytest.fixture(autouse=True)
def _float64():
    keras.config.set_floatx("float64")


def problem(name):
    """A model with data, its operator, and the explicit matrix."""
    net, make_loss, y = CASES[name]
    model, loss = model_of(net), make_loss()
    x = inputs_of(model)
    operator = keras_kfc.FisherOperator(model, x, y, loss=loss, batch_size=2)
    variables = [v.value for v in model.trainable_variables]
    inputs = tf.constant(x)
    explicit = explicit_ggn(
        lambda x: model(x, training=False), inputs, variables, lambda o: loss(tf.constant(y), o)
    )
    return model, x, operator, explicit


@pytest.mark.parametrize("name", few(list(CASES), 1))
def test_products_are_those_of_the_explicit_matrix(name):
    model, _, operator, explicit = problem(name)
    vectors = np.random.default_rng(3).normal(size=(len(explicit), 3))
    assert relative_error(operator @ vectors, explicit @ vectors) < 1e-9
    damped = operator.with_damping(0.3)
    matrix = explicit + 0.3 * np.eye(len(explicit))
    assert relative_error(damped @ vectors[:, 0], matrix @ vectors[:, 0]) < 1e-9
    assert relative_error(damped @ vectors[:, 0], explicit @ vectors[:, 0]) > 1e-2  # control
    form = vectors.T @ matrix @ vectors
    assert relative_error(damped.quadratic_form(vectors), form) < 1e-9
    assert damped.quadratic_form(vectors[:, 1]) == pytest.approx(form[1, 1])
    assert relative_error(damped.diagonal(), np.diag(matrix)) < 1e-9
    assert operator.shape == explicit.shape
    assert operator.dtype == np.float64
    assert sum(v.shape.num_elements() for v in (w.value for w in model.trainable_variables)) == len(
        explicit
    )


@pytest.mark.slow
def test_eigenvalues_solutions_and_estimates_are_those_of_the_explicit_matrix():
    _, _, operator, explicit = problem("conv net")
    operator = operator.with_damping(0.05)
    matrix = explicit + 0.05 * np.eye(len(explicit))
    expected = np.sort(np.linalg.eigvalsh(matrix))[::-1]
    np.testing.assert_allclose(operator.eigenvalues(3), expected[:3], rtol=1e-8)
    np.testing.assert_allclose(operator.eigenvalues(2, smallest=True), expected[-2:], rtol=1e-6)
    right = np.random.default_rng(1).normal(size=(len(matrix), 2))
    solution = operator.solve(right, tolerance=1e-10)
    assert relative_error(solution, np.linalg.solve(matrix, right)) < 1e-8
    assert operator.iterations > 4
    assert operator.trace() == pytest.approx(np.trace(matrix), rel=1e-9)
    assert operator.trace(samples=60, seed=0) == pytest.approx(np.trace(matrix), rel=0.1)
    estimate = operator.diagonal(samples=60, seed=0)
    assert 1e-3 < relative_error(estimate, np.diag(matrix)) < 0.3
    scipy_operator = operator.to_scipy()
    np.testing.assert_allclose(scipy_operator @ right[:, 0], matrix @ right[:, 0], atol=1e-9)
    with pytest.raises(RuntimeError, match="tolerance=1e-12 in 2 iterations"):
        operator.solve(right[:, 0], tolerance=1e-12, max_iterations=2)


@pytest.mark.slow
def test_vectors_may_be_lists_in_the_shapes_of_the_variables():
    model, _, operator, explicit = problem("conv net")
    vectors = [np.random.default_rng(4).normal(size=v.shape) for v in model.trainable_variables]
    flat = np.concatenate([part.ravel() for part in vectors])
    product = operator @ vectors
    assert [part.shape for part in product] == [tuple(v.shape) for v in model.trainable_variables]
    found = np.concatenate([part.ravel() for part in product])
    assert relative_error(found, explicit @ flat) < 1e-9
    with pytest.raises(ValueError, match="an array for each trainable variable"):
        operator @ vectors[1:]
    with pytest.raises(ValueError, match=r"shape \(.*, k\)"):
        operator @ flat[1:]


@pytest.mark.parametrize("floatx", ["float32", "float64"])
@pytest.mark.slow
def test_xla_computes_the_same(floatx):
    keras.config.set_floatx(floatx)
    # XLA has the second derivative of max-pooling in float32 alone.
    net = [layer for layer in conv_net() if not isinstance(layer, keras.layers.MaxPooling2D)]
    keras.utils.set_random_seed(0)
    model = keras.Sequential(net if floatx == "float64" else conv_net())
    x = inputs_of(model).astype(floatx)
    plain, compiled = (
        keras_kfc.FisherOperator(model, x, loss=sparse(), batch_size=5, jit_compile=jit)
        for jit in (False, True)
    )
    vector = np.random.default_rng(0).normal(size=plain.shape[0])
    error = relative_error(compiled @ vector, plain @ vector)
    assert error < (1e-12 if floatx == "float64" else 1e-5)


@pytest.mark.slow
def test_training_passes_of_batch_normalisation_and_dropout_are_not_meant():
    model, x, operator, _ = problem("conv net")
    before = [v.numpy() for v in model.variables]
    operator @ np.ones(operator.shape[0])
    for variable, value in zip(model.variables, before, strict=True):
        np.testing.assert_array_equal(variable.numpy(), value)
    assert type(model.layers[0]) is keras.layers.Conv2D


class TestKronecker:
    """The approximation, which is exact where theory says so."""

    @staticmethod
    def linear(layers=(3,)):
        keras.utils.set_random_seed(0)
        model = keras.Sequential([keras.Input((4,)), *map(keras.layers.Dense, layers)])
        x = np.random.default_rng(0).normal(size=(9, 4))
        exact = keras_kfc.FisherOperator(model, x, loss="mse")
        return exact, keras_kfc.KroneckerFisherOperator(model, x, loss="mse")

    @pytest.mark.slow
    def test_everything_follows_from_the_matrix(self):
        exact, blocks = self.linear()
        matrix = exact.to_dense() + 0.2 * np.eye(exact.shape[0])
        damped = blocks.with_damping(0.2)
        vector = np.random.default_rng(0).normal(size=len(matrix))
        assert relative_error(damped.to_dense(), matrix) < 1e-9
        assert relative_error(damped.solve(vector), np.linalg.solve(matrix, vector)) < 1e-9
        assert relative_error(damped.diagonal(), np.diag(matrix)) < 1e-9
        assert damped.logdet() == pytest.approx(np.linalg.slogdet(matrix)[1])
        assert damped.trace() == pytest.approx(np.trace(matrix))
        assert damped.quadratic_form(vector) == pytest.approx(vector @ matrix @ vector)
        expected = np.linalg.eigvalsh(matrix)[::-1]
        np.testing.assert_allclose(damped.eigenvalues(), expected, atol=1e-9)
        draws = damped.sample(5000, seed=0)
        assert relative_error(draws @ draws.T / 5000, np.linalg.inv(matrix)) < 0.1
        assert damped.sample(seed=1).shape == (len(matrix),)
        # Another model's matrix fails all of this.
        assert relative_error(blocks.to_dense(), matrix) > 0.05

    @pytest.mark.slow
    def test_blocks_of_a_deep_linear_net_are_exact_and_nothing_is_beside_them(self):
        exact, blocks = self.linear((3, 2))
        matrix, found = exact.to_dense(), blocks.to_dense()
        sizes = [15, 8]
        for start, stop in ((0, 15), (15, sum(sizes))):
            part = slice(start, stop)
            assert relative_error(found[part, part], matrix[part, part]) < 1e-9
        assert np.abs(found[:15, 15:]).max() == 0
        assert np.abs(matrix[:15, 15:]).max() > 1e-3

    @pytest.mark.slow
    def test_as_preconditioner_it_saves_iterations(self):
        keras.utils.set_random_seed(0)
        model = keras.Sequential(
            [keras.Input((6,)), keras.layers.Dense(8, activation="tanh"), keras.layers.Dense(4)]
        )
        scales = 10.0 ** np.linspace(-1.5, 1.5, 6)
        x = scales * np.random.default_rng(0).normal(size=(300, 6))
        exact = keras_kfc.FisherOperator(model, x, loss="mse", damping=1e-4)
        blocks = keras_kfc.KroneckerFisherOperator(model, x, loss="mse", damping=1e-4)
        right = exact @ np.random.default_rng(1).normal(size=exact.shape[0])
        iterations = []
        for preconditioner in (None, blocks):
            solution = exact.solve(right, preconditioner=preconditioner, tolerance=1e-8)
            assert relative_error(exact @ solution, right) < 1e-6
            iterations.append(exact.iterations)
        assert iterations[1] < 0.7 * iterations[0]

    @pytest.mark.slow
    def test_variables_without_a_block_have_their_diagonal(self):
        model, x, exact, explicit = problem("conv net")
        blocks = keras_kfc.KroneckerFisherOperator(model, x, LABELS, loss=sparse(), seed=0)
        index = next(i for i, v in enumerate(model.trainable_variables) if v.name == "scale")
        sizes = [v.value.shape.num_elements() for v in model.trainable_variables]
        own = slice(sum(sizes[:index]), sum(sizes[: index + 1]))
        assert relative_error(blocks.diagonal()[own], np.diag(explicit)[own]) < 0.5
        assert "conv2d" in blocks.blocks[0].path

    def test_a_singular_matrix_asks_for_damping(self):
        deficient = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
        blocks = keras_kfc.KroneckerFisherOperator(deficient, np.zeros((2, 4)), loss="mse")
        for call in (blocks.logdet, blocks.sample, lambda: blocks.solve(np.ones(10))):
            with pytest.raises(ValueError, match="`damping` must be positive"):
                call()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"model": "net"}, TypeError, "keras.Model"),
        ({"x": None}, TypeError, "`x`"),
        ({"y": LABELS[:2]}, ValueError, "`y` must have as many"),
        ({"damping": -1}, ValueError, "`damping`"),
        ({"loss": None}, ValueError, "`loss` is needed"),
        ({"batch_size": 0}, ValueError, "`batch_size`"),
    ],
)
def test_bad_arguments_are_refused_by_name(change, error, message):
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    arguments = {"model": model, "x": np.ones((5, 4)), "y": LABELS, "loss": sparse(), **change}
    for kind in (keras_kfc.FisherOperator, keras_kfc.KroneckerFisherOperator):
        with pytest.raises(error, match=message):
            kind(**arguments)
