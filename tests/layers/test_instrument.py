"""`instrument`, `strip` and `coverage` on every kind of Keras model."""

import keras
import numpy as np
import pytest
from helpers import few
from keras import layers
from nets import conv_net, flat_weights, image_batch, train

import keras_kfc


def functional_with_branches():
    inputs = keras.Input((8, 8, 2), name="images")
    left = layers.Conv2D(4, 3, padding="same", name="left")(inputs)
    right = layers.Conv2D(4, 1, name="right")(inputs)
    joined = layers.Flatten()(layers.Add()([left, right]))
    return keras.Model(inputs, layers.Dense(3, activation="softmax", name="head")(joined))


def nested():
    inner = keras.Sequential(
        [keras.Input((8, 8, 2)), layers.Conv2D(4, 3, name="deep"), layers.ReLU()], name="inner"
    )
    inputs = keras.Input((8, 8, 2))
    outputs = layers.Flatten()(inner(inputs))
    return keras.Model(inputs, layers.Dense(3, activation="softmax", name="head")(outputs))


@keras.saving.register_keras_serializable(package="tests")
class Subclassed(keras.Model):
    """Layers as attributes, in lists and in dicts."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.convolutions = [layers.Conv2D(4, 3, strides=2, name=f"conv_{i}") for i in range(2)]
        self.heads = {"main": layers.Dense(3, activation="softmax", name="head")}
        self.flatten = layers.Flatten()

    def call(self, inputs):
        for convolution in self.convolutions:
            inputs = convolution(inputs)
        return self.heads["main"](self.flatten(inputs))


MODELS = {
    "sequential": (lambda: conv_net(layers, batch_norm=False), ["conv", "dense"]),
    "unbuilt sequential": (
        lambda: keras.Sequential(
            [layers.Conv2D(4, 3, name="conv"), layers.Flatten(), layers.Dense(3, "softmax")]
        ),
        ["conv", "dense"],
    ),
    "functional": (functional_with_branches, ["left", "right", "head"]),
    "nested": (nested, ["deep", "head"]),
    "subclassed": (Subclassed, ["conv_0", "conv_1", "head"]),
}


def leaf_names(paths):
    return [path.split("/")[-1] for path in paths]


@pytest.mark.parametrize("name", few(MODELS, 2))
def test_every_layer_is_covered_and_trained(name):
    build, expected = MODELS[name]
    images, _ = image_batch()
    model = build()
    plain_outputs = model(images).numpy()
    assert keras_kfc.coverage(model).covered == []
    assert keras_kfc.instrument(model) is model
    assert sorted(leaf_names(keras_kfc.coverage(model).covered)) == sorted(expected)
    np.testing.assert_array_equal(model(images).numpy(), plain_outputs)
    before = [w.copy() for w in model.get_weights()]
    train(model, keras_kfc.KFC(), steps=2)
    assert sorted(leaf_names(b.path for b in model.optimizer.blocks)) == sorted(expected)
    for old, new in zip(before, model.get_weights(), strict=True):
        assert np.abs(new - old).max() > 0
    assert all(np.abs(block.gamma).max() > 0 for block in model.optimizer.blocks)


@pytest.mark.slow
@pytest.mark.parametrize("name", few(MODELS, 1))
def test_a_model_instrumented_before_it_is_built_trains_the_same(name):
    build, expected = MODELS[name]
    images, _ = image_batch()
    weights = []
    for build_first in (True, False):
        keras.utils.set_random_seed(1)
        model = build()
        if build_first:
            model(images)
        keras_kfc.instrument(model)
        weights.append(train(model, keras_kfc.KFC(seed=1), steps=2))
        assert len(model.optimizer.blocks) == len(expected)
        keras_kfc.strip(model)
    np.testing.assert_array_equal(*weights)


@pytest.mark.parametrize("name", MODELS)
def test_strip_undoes_instrument(name):
    build, _ = MODELS[name]
    images, _ = image_batch()
    model = build()
    model(images)
    classes = [type(layer) for layer in model._flatten_layers()]
    weights = flat_weights(model)
    keras_kfc.instrument(model)
    assert classes != [type(layer) for layer in model._flatten_layers()]
    assert keras_kfc.strip(model) is model
    assert classes == [type(layer) for layer in model._flatten_layers()]
    np.testing.assert_array_equal(flat_weights(model), weights)
    for variable in model.trainable_variables:
        assert not hasattr(variable, "kronecker_layer")


@pytest.mark.nightly
def test_instrument_is_idempotent():
    model = keras_kfc.instrument(conv_net(layers))
    state = [(type(layer), dict(vars(layer))) for layer in model._flatten_layers()]
    keras_kfc.instrument(model)
    assert state == [(type(layer), dict(vars(layer))) for layer in model._flatten_layers()]
    train(model, keras_kfc.KFC(seed=1), steps=1)
    again = keras_kfc.instrument(keras_kfc.instrument(conv_net(layers)))
    train(again, keras_kfc.KFC(seed=1), steps=1)
    np.testing.assert_array_equal(flat_weights(again), flat_weights(model))


@pytest.mark.slow
def test_strip_of_a_trained_model_goes_on_with_another_optimizer():
    model = conv_net()
    train(model, keras_kfc.KFC(), steps=2)
    predictions = model.predict(image_batch()[0], verbose=0)
    keras_kfc.strip(model)
    np.testing.assert_array_equal(model.predict(image_batch()[0], verbose=0), predictions)
    train(model, "adam", steps=2)
    assert np.isfinite(flat_weights(model)).all()


def test_stripped_model_with_kfc_still_compiled_trains_by_the_fallback_rule():
    model = keras_kfc.strip(conv_net())
    train(model, keras_kfc.KFC(), steps=2)
    assert model.optimizer.blocks == []


def test_instrumenting_a_compiled_and_trained_model_takes_effect_at_the_next_compile():
    model = conv_net(layers)
    train(model, "sgd", steps=1)
    keras_kfc.instrument(model)
    train(model, keras_kfc.KFC(), steps=1)
    assert len(model.optimizer.blocks) == 3


def test_model_compiled_before_instrument_trains_with_blocks():
    """The optimizer is not built before the first step, so the order does not matter."""
    images, labels = image_batch()
    model = conv_net(layers)
    model.compile(keras_kfc.KFC(), "sparse_categorical_crossentropy")
    keras_kfc.instrument(model)
    model.fit(images, labels, verbose=0)
    assert len(model.optimizer.blocks) == 3


@pytest.mark.slow
def test_exclude_leaves_layers_to_the_fallback_rule():
    for by in ("name", "path"):
        model = conv_net(layers)
        keras_kfc.instrument(model, exclude=[getattr(model.layers[0], by)])
        assert leaf_names(keras_kfc.coverage(model).covered) == ["norm", "dense"]
        train(model, keras_kfc.KFC(), steps=1)
        assert leaf_names(b.path for b in model.optimizer.blocks) == ["norm", "dense"]
    model = keras_kfc.instrument(conv_net(layers))
    keras_kfc.instrument(model, exclude=(name for name in ["dense"]))
    assert leaf_names(keras_kfc.coverage(model).covered) == ["conv", "norm"]


def test_exclude_reaches_into_containers_and_subclasses():
    model = keras_kfc.instrument(nested(), exclude=["inner"])
    assert leaf_names(keras_kfc.coverage(model).covered) == ["head"]

    class Own(keras_kfc.layers.Dense):
        """A capturing layer that does something else than the capture knows."""

        def call(self, inputs):
            return 2 * plain_call(self, inputs)

    plain_call = layers.Dense.call
    model = keras.Sequential([keras.Input((4,)), Own(3, name="own"), layers.Dense(3, name="head")])
    keras_kfc.instrument(model, exclude=["own"])
    assert leaf_names(keras_kfc.coverage(model).covered) == ["head"]
    model.compile(keras_kfc.KFC(), "mse")
    model.fit(np.ones((8, 4)), np.ones((8, 3)), verbose=0)
    assert len(model.optimizer.blocks) == 1
    keras_kfc.instrument(model)
    assert leaf_names(keras_kfc.coverage(model).covered) == ["own", "head"]


def test_what_may_couple_examples_in_a_loop_is_left_to_the_fallback_rule():
    """Inside TimeDistributed a batch normalisation sees one step at a time."""
    inner = keras.Sequential([keras_kfc.layers.Dense(3, name="inner"), layers.BatchNormalization()])
    model = keras.Sequential(
        [keras.Input((5, 4)), layers.TimeDistributed(inner), layers.Flatten(), layers.Dense(2)]
    )
    factors = keras_kfc.kronecker_factors(model, np.ones((8, 5, 4)), loss="mse")
    assert list(factors) == [model.layers[-1].path]
    assert type(inner.layers[0]) is keras_kfc.layers.Dense  # as it was
    reason = keras_kfc.coverage(model).fallback[inner.layers[0].path]
    assert reason == "inside TimeDistributed, and may couple examples"
    keras_kfc.instrument(model).compile(keras_kfc.KFC(), "mse")
    model.fit(np.ones((8, 5, 4)), np.ones((8, 2)), verbose=0)
    assert len(model.optimizer.blocks) == 1


@pytest.mark.slow
def test_changing_layers_after_the_optimizer_was_built_is_told(caplog):
    model = conv_net(layers)
    train(model, keras_kfc.KFC(), steps=1)
    assert "fallback rule, an Adam, trains everything" in caplog.text
    caplog.clear()
    keras_kfc.instrument(model)
    assert "Compile the model again" in caplog.text
    train(model, keras_kfc.KFC(), steps=1)
    keras_kfc.strip(model)
    with pytest.raises(
        ValueError, match=r"was stripped or quantised after the optimizer was built"
    ):
        model.fit(*image_batch(), verbose=0)


def test_bad_arguments_are_refused_by_name():
    for exclude in (3, None, [3]):
        with pytest.raises(TypeError, match="`exclude` must be an iterable of names"):
            keras_kfc.instrument(conv_net(layers), exclude=exclude)
    with pytest.raises(ValueError, match=r"`exclude`.*lacks \['denze'\]"):
        keras_kfc.instrument(conv_net(layers), exclude=["denze"])
    for function in (keras_kfc.instrument, keras_kfc.strip, keras_kfc.coverage):
        with pytest.raises(TypeError, match=r"`model` must be an instance of `keras.Model`"):
            function(layers.Dense(2))


def messages(caplog):
    return [record.getMessage() for record in caplog.records]


def test_layers_added_around_an_instrumented_model_are_told_once(caplog):
    base = keras_kfc.instrument(keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)]))
    model = keras.Sequential([keras.Input((4,)), base, keras.layers.Dense(2, name="added")])
    model.compile(keras_kfc.KFC(), "mse")
    for _ in range(2):
        model.fit(np.ones((8, 4)), np.ones((8, 2)), verbose=0)
    (message,) = [m for m in messages(caplog) if "not instrumented" in m]
    assert "1 layers that could have a block" in message and "added" in message


def test_layers_that_were_excluded_are_not_told(caplog):
    layers = [keras.layers.Dense(3), keras.layers.Dense(2, name="head")]
    model = keras_kfc.instrument(keras.Sequential([keras.Input((4,)), *layers]), exclude=["head"])
    model.compile(keras_kfc.KFC(), "mse")
    model.fit(np.ones((8, 4)), np.ones((8, 2)), verbose=0)
    assert not messages(caplog)


@pytest.mark.nightly
def test_strip_and_instrument_between_two_fits_changes_nothing(caplog):
    models = [conv_net(keras.layers) for _ in range(2)]
    for model in models:
        keras_kfc.instrument(model)
        train(model, keras_kfc.KFC(seed=3), steps=3)
    keras_kfc.instrument(keras_kfc.strip(models[1]))
    images, labels = image_batch()
    for model in models:
        model.fit(images, labels, batch_size=32, epochs=3, shuffle=False, verbose=0)
    np.testing.assert_array_equal(flat_weights(models[1]), flat_weights(models[0]))
    assert not messages(caplog)
