"""Models of every shape: several inputs and outputs, nested, shared layers, two optimizers."""

import keras
import nets
import numpy as np
import pytest
from helpers import few

from keras_kfc import KFC
from keras_kfc.layers import Dense

LOSS = "sparse_categorical_crossentropy"
# Without a rule for the step and the decay, which join all layers, branches train independently.
SETTINGS = {
    "fisher": "exact",
    "polyak_scaling": None,
    "learning_rate": 0.01,
    "weight_decay": None,
    "seed": 3,
    "weight_sharing": "expand",
}


def data(examples=32, seed=5):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, size=examples)
    centres = np.random.default_rng(0).normal(size=(3, 6))
    return (centres[labels] + rng.normal(size=(examples, 6))).astype("float32"), labels


def branch(name, seed):
    keras.utils.set_random_seed(seed)
    inputs = keras.Input((6,), name=f"{name}_in")
    hidden = Dense(5, activation="tanh", name=f"{name}_hidden")(inputs)
    return inputs, Dense(3, activation="softmax", name=f"{name}_out")(hidden)


def train(model, x, y, steps=5, loss=LOSS, **compiled):
    model.compile(KFC(**SETTINGS), loss, **compiled)
    nets.build_optimizer(model)
    for _ in range(steps):
        model.train_on_batch(x, y)
    return nets.flat_weights(model)


@pytest.mark.slow
@pytest.mark.parametrize("form", [pytest.param("list", marks=pytest.mark.nightly), "dict"])
def test_two_inputs_and_outputs_train_as_two_models(form):
    (x1, y1), (x2, y2) = data(seed=5), data(seed=6)
    separate = np.concatenate(
        [
            train(keras.Model(*branch("first", 1)), x1, y1),
            train(keras.Model(*branch("second", 2)), x2, y2),
        ]
    )
    keras.backend.clear_session(free_memory=False)
    (in1, out1), (in2, out2) = branch("first", 1), branch("second", 2)
    if form == "list":
        model = keras.Model([in1, in2], [out1, out2])
        joint = train(model, [x1, x2], [y1, y2])
    else:
        model = keras.Model({"a": in1, "b": in2}, {"u": out1, "v": out2})
        joint = train(model, {"a": x1, "b": x2}, {"u": y1, "v": y2})
    layers = ["first_hidden", "first_out", "second_hidden", "second_out"]
    joint = np.concatenate(
        [np.concatenate([w.ravel() for w in model.get_layer(n).get_weights()]) for n in layers]
    )
    np.testing.assert_allclose(joint, separate, rtol=1e-3, atol=1e-5)


@pytest.mark.nightly
def test_loss_weights_of_an_output_do_not_reach_the_other_branch():
    """Scale-free damping: a branch trains alike whatever its loss is multiplied by."""
    (x1, y1), (x2, y2) = data(seed=5), data(seed=6)
    results = []
    for weights in ([1.0, 1.0], [1.0, 100.0]):
        keras.backend.clear_session(free_memory=False)
        (in1, out1), (in2, out2) = branch("first", 1), branch("second", 2)
        model = keras.Model([in1, in2], [out1, out2])
        loss = [LOSS, LOSS]
        results.append(train(model, [x1, x2], [y1, y2], loss=loss, loss_weights=weights))
    np.testing.assert_allclose(results[1], results[0], rtol=1e-3, atol=1e-5)


def stack(names=("hidden", "out")):
    keras.utils.set_random_seed(1)
    return [Dense(5, activation="tanh", name=names[0]), Dense(3, "softmax", name=names[1])]


@pytest.mark.slow
def test_models_in_models_train_as_flat_ones():
    x, y = data()
    flat = train(keras.Sequential([keras.Input((6,)), *stack()]), x, y)
    hidden, out = stack()
    inner = keras.Sequential([keras.Input((6,)), hidden])
    middle_in = keras.Input((6,))
    middle = keras.Model(middle_in, inner(middle_in))
    nested = train(keras.Sequential([keras.Input((6,)), middle, out]), x, y)
    np.testing.assert_allclose(nested, flat, rtol=1e-4, atol=1e-6)


def test_a_shared_layer_has_one_block_of_all_its_uses():
    """Two uses on two inputs: factors are sums over the uses, as over positions."""
    (x1, y1), (x2, _) = data(seed=5), data(seed=6)
    keras.utils.set_random_seed(1)
    first, second = keras.Input((6,)), keras.Input((6,))
    shared = Dense(4, activation="tanh", name="shared")
    merged = keras.layers.Concatenate()([shared(first), shared(second)])
    model = keras.Model([first, second], Dense(3, "softmax", name="out")(merged))
    before = nets.flat_weights(model)
    after = train(model, [x1, x2], y1, steps=1)
    assert [b.path.split("/")[-1] for b in model.optimizer.blocks] == ["shared", "out"]
    block = model.optimizer.blocks[0]
    extended = [np.column_stack([x, np.ones(len(x))]).astype("float64") for x in (x1, x2)]
    omega = sum(a.T @ a for a in extended) / len(x1)
    np.testing.assert_allclose(np.asarray(block.omega)[0], omega, rtol=1e-4)
    assert np.abs(after - before).max() > 0


@pytest.mark.slow
def test_one_layer_in_two_models():
    """Each model's optimizer has a block of its own for it, from its own data alone."""
    (x1, y1), (x2, y2) = data(seed=5), data(seed=6)
    x2 = 3 * x2
    keras.utils.set_random_seed(1)
    common = Dense(5, activation="tanh", name="common")
    models = [
        keras.Sequential([keras.Input((6,)), common, Dense(3, "softmax", name=f"out{i}")])
        for i in range(2)
    ]
    for model in models:
        model.compile(KFC(**SETTINGS, curvature_ema=0.0, curvature_update_period=1), LOSS)

    def losses():
        return models[0].evaluate(x1, y1, verbose=0) + models[1].evaluate(x2, y2, verbose=0)

    before = losses()
    for _ in range(3):
        for model, x, y in zip(models, (x1, x2), (y1, y2), strict=True):
            model.train_on_batch(x, y)
    for model, x in zip(models, (x1, x2), strict=True):
        extended = np.column_stack([x, np.ones(len(x))]).astype("float64")
        block = model.optimizer.blocks[0]
        np.testing.assert_allclose(
            np.asarray(block.omega)[0], extended.T @ extended / len(x), rtol=1e-4, atol=1e-6
        )
    assert models[0].layers[0] is models[1].layers[0]
    assert losses() < before


@pytest.mark.parametrize("run_eagerly", few([True, False], 1))
@pytest.mark.slow
def test_two_models_in_turn_train_as_each_alone(run_eagerly):
    (x1, y1), (x2, y2) = data(seed=5), data(seed=6)
    alone = [
        train(keras.Model(*branch("first", 1)), x1, y1, run_eagerly=run_eagerly),
        train(keras.Model(*branch("second", 2)), x2, y2, run_eagerly=run_eagerly),
    ]
    models = [keras.Model(*branch("first", 1)), keras.Model(*branch("second", 2))]
    for model in models:
        model.compile(KFC(**SETTINGS), LOSS, run_eagerly=run_eagerly)
    for _ in range(5):
        models[0].train_on_batch(x1, y1)
        models[1].train_on_batch(x2, y2)
    for model, expected in zip(models, alone, strict=True):
        np.testing.assert_allclose(nets.flat_weights(model), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.nightly
def test_one_optimizer_cannot_serve_two_models():
    optimizer = KFC(seed=3)
    x, y = data()
    models = [keras.Sequential([keras.Input((6,)), *stack()]) for _ in range(2)]
    models[0].compile(optimizer, LOSS)
    models[0].train_on_batch(x, y)
    models[1].compile(optimizer, LOSS)
    with pytest.raises((ValueError, KeyError), match="optimizer"):
        models[1].train_on_batch(x, y)
