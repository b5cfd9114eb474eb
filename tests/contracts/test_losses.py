"""What the output model of every loss must do, for every loss function that is registered.

Tests of a family's own say that its matrix is the right one (`test_likelihood`,
`test_families`); here it is what any model must have: columns and draws of the same matrix, scaled
as Keras weighs examples, and a lowest value that no output goes below.
"""

import inspect

import keras
import numpy as np
import pytest
import tensorflow as tf

from conftest import relative_error
from keras_kfc.losses.api import OutputModel, kind_of, known_functions
from keras_kfc.losses.derivatives import output_derivatives
from keras_kfc.losses.families import family_of
from keras_kfc.losses.lowest import loss_lower_bound
from keras_kfc.losses.output_curvature import OutputCurvature
from keras_kfc.losses.signs import random_signs
from keras_kfc.losses.terms import LossTerm

EXAMPLES, OUTPUTS = 4, 3
RNG = np.random.default_rng(0)
REAL = RNG.normal(size=(EXAMPLES, OUTPUTS))
POSITIVE = np.exp(RNG.normal(size=(EXAMPLES, OUTPUTS)))
SHARES = POSITIVE / POSITIVE.sum(-1, keepdims=True)
OTHER_SHARES = SHARES[::-1] ** 2 / (SHARES[::-1] ** 2).sum(-1, keepdims=True)
ONE_HOT = np.eye(OUTPUTS)[[0, 2, 1, 0]]
EVENTS = RNG.uniform(0.1, 0.9, size=(EXAMPLES, OUTPUTS))
BITS = (EVENTS > 0.5).astype(float)
LABELS = np.array([0, 2, 1, 0])

# A line for each registered loss: the loss, targets, outputs.
LOSSES = {
    "mean_squared_error": (keras.losses.MeanSquaredError, REAL[::-1], REAL),
    "binary_crossentropy": (keras.losses.BinaryCrossentropy, BITS, EVENTS),
    "categorical_crossentropy": (keras.losses.CategoricalCrossentropy, OTHER_SHARES, SHARES),
    "sparse_categorical_crossentropy": (
        keras.losses.SparseCategoricalCrossentropy,
        LABELS,
        SHARES,
    ),
    "poisson": (keras.losses.Poisson, np.floor(3 * POSITIVE), POSITIVE[::-1]),
    "kl_divergence": (keras.losses.KLDivergence, OTHER_SHARES, SHARES),
    "mean_squared_logarithmic_error": (
        keras.losses.MeanSquaredLogarithmicError,
        POSITIVE,
        POSITIVE[::-1],
    ),
    "huber": (keras.losses.Huber, REAL[::-1], REAL),
    "log_cosh": (keras.losses.LogCosh, REAL[::-1], REAL),
    "mean_absolute_error": (keras.losses.MeanAbsoluteError, REAL[::-1], REAL),
    "mean_absolute_percentage_error": (
        keras.losses.MeanAbsolutePercentageError,
        POSITIVE,
        POSITIVE[::-1],
    ),
    "hinge": (keras.losses.Hinge, 2 * BITS - 1, REAL),
    "squared_hinge": (keras.losses.SquaredHinge, 2 * BITS - 1, REAL),
    "categorical_hinge": (keras.losses.CategoricalHinge, ONE_HOT, REAL),
    "binary_focal_crossentropy": (keras.losses.BinaryFocalCrossentropy, BITS, EVENTS),
    "categorical_focal_crossentropy": (
        keras.losses.CategoricalFocalCrossentropy,
        ONE_HOT,
        SHARES,
    ),
    "categorical_generalized_cross_entropy": (
        keras.losses.CategoricalGeneralizedCrossEntropy,
        LABELS,
        SHARES,
    ),
    "cosine_similarity": (keras.losses.CosineSimilarity, REAL[::-1], REAL),
    "dice": (lambda: keras.losses.Dice(axis=-1), ONE_HOT, SHARES),
    "tversky": (lambda: keras.losses.Tversky(axis=-1), ONE_HOT, SHARES),
    "circle": (keras.losses.Circle, LABELS, REAL),
    "ctc": (keras.losses.CTC, LABELS[:, None], REAL[:, None] * np.ones((1, 5, 1))),
}
# An example's loss depends on all others.
WHOLE_BATCH = {"circle"}
QUICK = {"categorical_crossentropy", "huber", "cosine_similarity", "ctc"}
NAMES = [pytest.param(n, marks=() if n in QUICK else pytest.mark.nightly) for n in LOSSES]
every = pytest.mark.parametrize("name", NAMES)


def term_of(name, sample_weight=None):
    loss, y_true, y_pred = LOSSES[name]
    weight = None if sample_weight is None else tf.constant(sample_weight, tf.float32)
    targets, outputs = tf.constant(y_true, tf.float32), tf.constant(y_pred, tf.float32)
    return LossTerm(loss(), targets, outputs, weight)


def columns_of(model):
    count = int(model.count_columns())
    return np.stack([model.column(tf.constant(i))[0].numpy().ravel() for i in range(count)])


def matrix_of(columns, examples=EXAMPLES):
    """`Σ_k r_k r_kᵀ` of each example, from columns `(k, examples * n)`."""
    parts = columns.reshape(len(columns), examples, -1)
    return np.einsum("kbi,kbj->bij", parts, parts)


def test_every_registered_loss_is_here():
    assert set(LOSSES) == {function.__name__ for function in known_functions()}


@every
def test_a_model_has_the_members_of_the_protocol(name):
    model = family_of(term_of(name)).part
    for member, _ in inspect.getmembers(OutputModel):
        assert member.startswith("_") or hasattr(model, member), member
    for tensors in (model.sample(tf.constant([1, 2], tf.int64)), model.column(tf.constant(0))):
        assert len(tensors) == len(model.sources)
        for tensor, source in zip(tensors, model.sources, strict=True):
            assert tensor.shape == source.shape and tensor.dtype == source.dtype
            assert np.isfinite(tensor).all()


@every
def test_a_seed_says_what_is_drawn(name):
    model = family_of(term_of(name)).part

    def draw(first, second):
        return model.sample(tf.constant([first, second], tf.int64))[0].numpy()

    np.testing.assert_array_equal(draw(1, 2), draw(1, 2))
    others = [draw(number, 5) for number in range(8)]
    assert any(not np.array_equal(draw(1, 2), other) for other in others)


@every
def test_beyond_the_last_column_there_is_nothing(name):
    model = family_of(term_of(name)).part
    (beyond, *_) = model.column(model.count_columns())
    np.testing.assert_array_equal(beyond, np.zeros(beyond.shape))
    (before, *_) = model.column(tf.constant(-1))
    np.testing.assert_array_equal(before, np.zeros(before.shape))


@every
def test_draws_are_those_of_the_columns(name):
    """Of the empirical matrix they are its one column, with random signs."""
    family = family_of(term_of(name))
    expected = matrix_of(columns_of(family.part))
    draws = np.stack(
        [
            family.part.sample(tf.constant([seed, 3], tf.int64))[0].numpy().ravel()
            for seed in range(200)
        ]
    )
    parts = draws.reshape(len(draws), EXAMPLES, -1)
    products = parts[..., :, None] * parts[..., None, :]
    error = products.std(0) / np.sqrt(len(draws)) + 1e-4 * np.abs(expected).max()
    assert (np.abs(products.mean(0) - expected) < 5 * error).all()


@every
def test_curvature_propagation_starts_from_the_root_times_random_signs(name):
    term, seed = term_of(name), tf.constant([5, 3], tf.int64)
    model = family_of(term).part
    derivatives = output_derivatives([term], "curvature_propagation", seed)
    signs = random_signs(model.root_shape(), seed, tf.float32)
    assert derivatives.count == 1 and set(signs.numpy().ravel()) <= {-1, 1}
    for found, expected in zip(
        derivatives.derivatives(tf.constant(0)), model.root_times(signs), strict=True
    ):
        np.testing.assert_array_equal(found, expected)


@every
def test_products_with_the_root_and_the_hessian_are_those_of_the_columns(name):
    """`R z` is linear in z, and `R Rᵀ u` is the columns' matrix times u over all examples."""
    term = term_of(name)
    model, rng = family_of(term).part, np.random.default_rng(0)
    shape = tuple(model.root_shape().numpy())
    first, second = rng.normal(size=(2, *shape)).astype("float32")

    def times(z):
        return np.concatenate([p.numpy().ravel() for p in model.root_times(tf.constant(z))])

    np.testing.assert_allclose(
        times(2 * first - second), 2 * times(first) - times(second), rtol=1e-4, atol=1e-5
    )
    if len(model.sources) > 1:
        return
    curvature = OutputCurvature([term])
    columns = columns_of(model)
    tangents = rng.normal(size=columns.shape[1:]).astype("float32")
    by_example = np.einsum("bij,bj->bi", matrix_of(columns), tangents.reshape(EXAMPLES, -1))
    (product,) = curvature.times([tf.reshape(tangents, model.sources[0].shape)])
    assert relative_error(product.numpy().ravel(), by_example.ravel() / EXAMPLES) < 1e-4
    whole = np.stack(
        [curvature.column(tf.constant(i))[0].numpy().ravel() for i in range(int(curvature.size()))]
    )
    summed = np.einsum("ki,kj->ij", whole, whole) * EXAMPLES
    width = summed.shape[1] // EXAMPLES
    blocks = summed.reshape(EXAMPLES, width, EXAMPLES, width)
    own = np.stack([blocks[i, :, i] for i in range(EXAMPLES)])
    assert relative_error(own, matrix_of(columns)) < 1e-4


@pytest.mark.parametrize("name", [n for n in NAMES if n.values[0] not in WHOLE_BATCH])
def test_examples_have_the_weight_that_keras_gives_them(name):
    weights = np.array([0.5, 2.0, 0.0, 1.0])
    plain, weighted = (
        np.linalg.norm(matrix_of(columns_of(family_of(term_of(name, w)).part)), axis=(1, 2))
        for w in (None, weights)
    )
    assert weighted[2] == 0
    # What stands in for curvature has the unit of the mean loss, which weights change, for all
    # examples alike.
    counted = (weights > 0) & (plain > 1e-6)
    ratios = weighted[counted] / (weights[counted] * plain[counted])
    np.testing.assert_allclose(ratios, ratios[0], rtol=1e-3)


@every
def test_no_output_is_below_the_lowest_value(name):
    term = term_of(name)
    lowest = loss_lower_bound([term])
    if not kind_of_loss(name).has_lowest:
        assert lowest is None
        return
    outputs = [term.y_pred, *(_perturbed(term.y_pred, number) for number in range(50))]
    values = [float(term.loss(term.y_true, outputs_)) for outputs_ in outputs]
    assert min(values) >= float(lowest) - 1e-5
    assert relative_error(float(lowest), values[0]) > 1e-3


def kind_of_loss(name):
    return kind_of(getattr(keras.losses, name))


def _perturbed(outputs, number):
    rng = np.random.default_rng(number)
    changed = outputs.numpy() * np.exp(rng.normal(size=outputs.shape))
    if number % 2:
        changed = changed / changed.sum(-1, keepdims=True)
    are_probabilities = np.all((outputs >= 0) & (outputs <= 1))
    return tf.constant(np.clip(changed, *((0, 1) if are_probabilities else (-10, 10))), tf.float32)
