"""Arguments, configuration and settable values of the optimizer."""

import ast
import inspect
import re

import keras
import numpy as np
import pytest
from nets import conv_net, train

import keras_kfc

NUMBERS = {
    "damping": (-0.1, float("nan"), float("inf")),
    "momentum": (-0.1, 1.0),
    "polyak_scaling": (-1.0, float("inf")),
    "norm_constraint": (0.0, -1.0),
    "curvature_ema": (-0.1, 1.0),
    "adam_lr_ratio": (-0.1,),
    "curvature_update_period": (0, -3),
    "inverse_update_period": (0,),
    "factor_batch_size": (0,),
    "max_factor_dim": (0, -1),
    "seed": (-1, 2**31),
    "learning_rate": (-1.0, float("nan"), float("inf")),
    "weight_decay": (-1.0,),
    "clipnorm": (0.0, -1.0),
    "clipvalue": (-1.0,),
    "global_clipnorm": (0.0,),
    "loss_scale_factor": (0.0,),
    "ema_momentum": (2.0, -0.1),
    "gradient_accumulation_steps": (0, 1),
    "ema_overwrite_frequency": (0,),
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in NUMBERS.items() for value in values]
)
def test_values_out_of_range_are_refused_by_name(name, value):
    with pytest.raises(ValueError, match=rf"`{name}` must be.*Received: {name}="):
        keras_kfc.KFC(**{name: value})


@pytest.mark.parametrize(
    "name",
    [*(n for n in NUMBERS if n != "learning_rate"), "nesterov", "relative_damping", "use_ema"],
)
@pytest.mark.parametrize("value", ["high", [1], {}, np.array([1, 2])])
def test_values_of_another_type_are_refused_by_name(name, value):
    with pytest.raises(TypeError, match=rf"`{name}` must be.*Received: {name}="):
        keras_kfc.KFC(**{name: value})


@pytest.mark.parametrize("value", ["fast", [1], {}])
def test_learning_rate_of_another_type_is_refused_by_name(value):
    with pytest.raises((TypeError, ValueError), match="`learning_rate` should be"):
        keras_kfc.KFC(learning_rate=value)


def test_periods_must_be_whole():
    for name in ("curvature_update_period", "inverse_update_period"):
        with pytest.raises(TypeError, match=f"`{name}` must be a positive integer"):
            keras_kfc.KFC(**{name: 2.5})


def test_fisher_must_be_a_known_kind():
    for fisher in ("true", None, 1, np.array(["sampled", "exact"])):
        with pytest.raises(ValueError, match=r"`fisher` must be one of.*Received: fisher="):
            keras_kfc.KFC(fisher=fisher)


def test_damping_must_be_given():
    with pytest.raises(TypeError, match="`damping` must be a number"):
        keras_kfc.KFC(damping=None)


def test_unknown_arguments_are_refused_by_name():
    with pytest.raises(ValueError, match="not_an_argument"):
        keras_kfc.KFC(not_an_argument=1)


SETTINGS = {
    "learning_rate": 0.01,
    "damping": 0.5,
    "momentum": 0.8,
    "nesterov": False,
    "polyak_scaling": 0.5,
    "norm_constraint": 1e-3,
    "fisher": "exact",
    "curvature_ema": 0.9,
    "curvature_update_period": 3,
    "inverse_update_period": 7,
    "factor_batch_size": 5,
    "max_factor_dim": 64,
    "relative_damping": False,
    "adam_lr_ratio": 0.1,
    "seed": 5,
    "weight_decay": 1e-3,
    "clipnorm": 1.0,
    "use_ema": True,
    "ema_momentum": 0.9,
    "gradient_accumulation_steps": 2,
    "name": "mine",
}


def test_config_round_trip():
    optimizer = keras_kfc.KFC(**SETTINGS)
    config = optimizer.get_config()
    for name, value in SETTINGS.items():
        assert config[name] == pytest.approx(value), name
    assert keras_kfc.KFC.from_config(config).get_config() == config
    restored = keras.optimizers.deserialize(keras.optimizers.serialize(optimizer))
    assert type(restored) is keras_kfc.KFC and restored.get_config() == config


def test_schedules_survive_the_config():
    decay = keras.optimizers.schedules.ExponentialDecay(0.1, 10, 0.5)
    growth = keras.optimizers.schedules.PolynomialDecay(0.5, 20, 0.1)
    optimizer = keras_kfc.KFC(learning_rate=decay, damping=growth, polyak_scaling=decay)
    restored = keras.optimizers.deserialize(keras.optimizers.serialize(optimizer))
    assert restored.get_config() == optimizer.get_config()
    restored.iterations.assign(20)
    assert float(restored.damping) == pytest.approx(0.1)
    assert float(restored.polyak_scaling) == pytest.approx(0.025)
    assert float(restored.learning_rate) == pytest.approx(0.025)


def test_every_argument_is_in_the_config_and_the_docstring_with_its_default():
    parameters = dict(inspect.signature(keras_kfc.KFC).parameters)
    del parameters["kwargs"]
    config = keras_kfc.KFC().get_config()
    documented = inspect.cleandoc(keras_kfc.KFC.__doc__).split("Args:")[1].split("Attributes:")[0]
    paragraphs = dict(re.findall(r"^    (\w+): (.*?)(?=^    \w|\Z)", documented, re.M | re.S))
    assert list(paragraphs) and set(paragraphs) == set(parameters) == set(config)
    said = {n: re.search(r"Defaults to `(.*?)`", text) for n, text in paragraphs.items()}
    for name, default in said.items():
        if default is not None and name != "name":
            assert ast.literal_eval(default[1]) == parameters[name].default, name
    assert sum(default is not None for default in said.values()) > 15


def test_every_attribute_exists_from_the_start():
    """Keras's serialisation tests compare `dir` before and after a round trip."""
    optimizer = keras_kfc.KFC()
    assert set(dir(optimizer)) == set(dir(keras_kfc.KFC.from_config(optimizer.get_config())))
    before = set(vars(optimizer))
    train(conv_net(), optimizer, steps=1)
    assert set(vars(optimizer)) - before <= {"built"} | {
        name for name in vars(optimizer) if name.startswith("_")
    }


@pytest.mark.nightly
def test_weights_of_the_optimizer_have_one_order():
    """Keras restores optimizer variables by position."""
    orders = []
    for _ in range(2):
        keras.backend.clear_session()
        model = conv_net()
        train(model, keras_kfc.KFC(), steps=1)
        orders.append([(v.name, tuple(v.shape)) for v in model.optimizer.variables])
    assert orders[0] == orders[1]


def test_polyak_is_set_during_training_unless_it_is_none():
    optimizer = keras_kfc.KFC()
    optimizer.build(conv_net().trainable_variables)
    optimizer.polyak_scaling = 0.25
    assert float(optimizer.polyak_scaling) == optimizer.get_config()["polyak_scaling"] == 0.25
    for value in (-1.0, float("nan")):
        with pytest.raises(ValueError, match="`polyak_scaling` must be"):
            optimizer.polyak_scaling = value
    with pytest.raises(TypeError, match="or None when the optimizer is created"):
        optimizer.polyak_scaling = None
    without = keras_kfc.KFC(polyak_scaling=None)
    assert without.polyak_scaling is None
    assert keras_kfc.KFC.from_config(without.get_config()).polyak_scaling is None
    # Not before the build either: the order of variables would be another.
    with pytest.raises(TypeError, match="if it was created with one"):
        without.polyak_scaling = 1.0


def test_scaling_is_larger_where_a_schedule_takes_steps_back():
    cosine = keras.optimizers.schedules.CosineDecay(0.03, 100)
    for rate, scaling in ((0.03, 1.0), (cosine, 3.0), (lambda: 0.03, 1.0)):
        optimizer = keras_kfc.KFC(rate)
        assert float(optimizer.polyak_scaling) == scaling
    restored = keras_kfc.KFC.from_config(keras_kfc.KFC(cosine).get_config())
    assert float(restored.polyak_scaling) == 3.0
    # What was given is taken, whatever the learning rate is.
    assert float(keras_kfc.KFC(cosine, polyak_scaling=1.0).polyak_scaling) == 1.0
    assert keras_kfc.KFC(cosine, polyak_scaling=None).polyak_scaling is None
    for value in ("fast", np.array(["auto", "auto"])):
        with pytest.raises(TypeError, match="`polyak_scaling` must be a number"):
            keras_kfc.KFC(polyak_scaling=value)


def test_a_schedule_of_damping_after_the_build_is_refused():
    optimizer = keras_kfc.KFC()
    optimizer.build(conv_net().trainable_variables)
    schedule = keras.optimizers.schedules.ExponentialDecay(0.1, 5, 0.5)
    with pytest.raises(TypeError, match=r"`LearningRateSchedule` when the optimizer is created"):
        optimizer.damping = schedule
    optimizer.damping = 0.5
    assert float(optimizer.damping) == 0.5
