"""The Fisher matrix of every family of losses, example by example.

Rows differ and each has its own weight, so that a coefficient which went to another
example would show. What a family must be is computed by loops in NumPy, or by automatic
differentiation of the Keras loss, in float64.
"""

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import few
from loss_cases import (
    CASES,
    LABELS,
    REAL,
    WEIGHTS,
    examples,
    own_joint,
    own_squared,
    part_and_matrix,
)

import keras_kfc
from conftest import explicit_ggn, relative_error
from keras_kfc.losses.families import family_of
from keras_kfc.losses.terms import LossTerm

losses = keras.losses


@pytest.fixture(autouse=True)
def _float64():
    keras.config.set_floatx("float64")


@pytest.mark.parametrize("case", few(CASES, 7))
def test_columns_make_up_the_matrix_of_each_example(case):
    part, expected = part_and_matrix(case)
    columns = examples(
        [tf.stack([part.column(tf.constant(k))[0] for k in range(int(part.count_columns()))])]
    )
    # One example's gradient is that of B times its share of the mean loss.
    matrix = np.einsum("kbi,kbj->bij", columns, columns) / len(WEIGHTS)
    np.testing.assert_allclose(matrix, expected, rtol=1e-6, atol=1e-9)
    assert relative_error(matrix[::-1], expected) > 0.1  # weights are those of the examples


@pytest.mark.parametrize("case", few(CASES, 6))
def test_draws_have_the_matrix_as_their_mean(case):
    part, expected = part_and_matrix(case)
    count = 3000

    @tf.function
    def draw():
        seeds = tf.range(count, dtype=tf.int64)
        return tf.map_fn(
            lambda step: part.sample(tf.stack([5, step]))[0],
            seeds,
            fn_output_signature=part.sources[0].dtype,
        )

    draws = examples([draw()])
    whole = np.einsum("kbi,kcj->kbicj", draws, draws) / len(WEIGHTS)
    mean, error = whole.mean(0), whole.std(0) / np.sqrt(count)
    target = np.zeros_like(mean)
    for number, block in enumerate(expected):
        target[number, :, number] = block
    # Different examples are independent, too.
    assert np.all(np.abs(mean - target) <= 5 * error + 1e-7 * np.abs(target).max())
    assert np.any(np.abs(mean - target[::-1, :, ::-1]) > 50 * error)


def hidden_gamma_and_ggn(loss, y, activation, positions=(), mask=None, **arguments):
    """Gamma of a layer whose rows all differ, by training, and the explicit matrix."""
    keras.utils.set_random_seed(2)
    shape = (*positions, 4)
    inputs = np.random.default_rng(0).normal(size=(5, *shape))
    if mask is not None:
        inputs[~mask] = 7.0
    stack = [
        keras.Input(shape),
        *([] if mask is None else [keras.layers.Masking(7.0)]),
        keras_kfc.layers.Dense(4, use_bias=False, name="hidden"),
        keras.layers.Activation("tanh"),
        keras.layers.Dense(3, activation=activation),
    ]
    model = keras.Sequential(stack)
    model.get_layer("hidden").set_weights([np.eye(4)])
    optimizer = keras_kfc.KFC(fisher="exact", curvature_update_period=1, weight_sharing="expand")
    # One step: tracing it would take longer.
    model.compile(optimizer=optimizer, loss=loss, run_eagerly=True)
    point = tf.Variable(inputs)
    kernel, bias = map(tf.constant, model.layers[-1].get_weights())
    weights = arguments.get("sample_weight")
    if "class_weight" in arguments:
        weights = np.array([arguments["class_weight"][label] for label in y])

    def loss_of_logits(logits):
        outputs = keras.activations.get(activation)(logits)
        if mask is not None:
            outputs._keras_mask = tf.constant(mask)
        return model.compute_loss(y=y, y_pred=outputs, sample_weight=weights)

    whole = explicit_ggn(
        lambda _: tf.tanh(point) @ kernel + bias, None, [point], loss_of_logits
    ).reshape(-1, 4, inputs.size // 4, 4)
    blocks = np.stack([whole[row, :, row] for row in range(len(whole))])
    model.fit(inputs, y, batch_size=5, shuffle=False, verbose=0, **arguments)
    (gamma,) = optimizer.blocks[0].gamma.numpy()
    count = int(np.prod(positions)) if positions else 1
    # Padding counts neither in the layer's input factor nor in its positions.
    real = 1.0 if mask is None else mask.mean()
    return gamma, blocks.sum(0) / (count * real)


POSITION_LABELS = np.random.default_rng(1).integers(0, 3, size=(5, 4))
MASK = np.array([[1, 1, 0, 1], [0, 1, 1, 1], [1, 0, 0, 0], [1, 1, 1, 1], [0, 0, 1, 0]], bool)
TRAINED = {
    "sample weights": ("mse", REAL, None, {"sample_weight": WEIGHTS}),
    "class weights": (
        "sparse_categorical_crossentropy",
        LABELS,
        "softmax",
        {"class_weight": {0: 0.3, 1: 5.0, 2: 1.0}},
    ),
    "own function": (own_squared, REAL, None, {"sample_weight": WEIGHTS}),
    "mask": (
        losses.MeanSquaredError(),
        np.random.default_rng(4).normal(size=(5, 4, 3)),
        None,
        {"positions": (4,), "mask": MASK},
    ),
    "mask and weights": (
        "sparse_categorical_crossentropy",
        POSITION_LABELS,
        "softmax",
        {
            "positions": (4,),
            "mask": MASK,
            "sample_weight": WEIGHTS[:, None] * np.array([1.0, 2.0, 0.5, 3.0]),
        },
    ),
    "own function of positions": (
        own_joint,
        np.eye(3)[POSITION_LABELS],
        None,
        {"positions": (4,), "mask": MASK},
    ),
}


@pytest.mark.parametrize("case", few(TRAINED, 2))
def test_training_gives_each_row_its_own_weight(case):
    loss, y, activation, options = TRAINED[case]
    gamma, expected = hidden_gamma_and_ggn(loss, y, activation, **options)
    assert relative_error(gamma, expected) < 1e-6


@pytest.mark.parametrize("axis", [1, 2])
@pytest.mark.parametrize("kind", [losses.CategoricalFocalCrossentropy, losses.Dice])
def test_outputs_of_an_element_on_any_axis(kind, axis):
    """Square, so that the shape alone does not tell which axis belongs to an element."""
    rng = np.random.default_rng(0)
    outputs, y = rng.uniform(0.1, 1, size=(2, 3, 3)), np.eye(3)[rng.integers(0, 3, size=(2, 3))]
    results = []
    for where in (axis, -1):
        o, t = (np.moveaxis(part, -1, where) for part in (outputs, y))
        part = family_of(LossTerm(kind(axis=where), tf.constant(t), tf.constant(o))).part
        columns = [part.column(tf.constant(k))[0].numpy() for k in range(9)]
        results.append(np.stack([np.moveaxis(column, where, -1) for column in columns]))
    for columns in results:
        assert np.abs(columns).max() > 0
    np.testing.assert_allclose(*(np.einsum("kbti,kbtj->btij", c, c) for c in results), rtol=1e-6)
