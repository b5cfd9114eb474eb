"""Whatever the model, the data and the arguments: no surprise.

Models, batches and arguments are drawn by hypothesis. Training must neither raise nor leave a
variable that is not finite where SGD would have left a finite one; bad arguments must raise
ValueError or TypeError with a message that names the argument.
"""

import inspect
import re

import keras
import numpy as np
import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

import keras_kfc
from keras_kfc import KFC

pytestmark = pytest.mark.slow

fuzz = settings(
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

LOSSES = (
    "sparse_categorical_crossentropy",
    "categorical_crossentropy",
    "binary_crossentropy",
    "mse",
)
HEADS = {"binary_crossentropy": "sigmoid", "mse": None}
POLICIES = ("float32", "float64", "mixed_bfloat16", "mixed_float16")


@st.composite
def convolutions(draw):
    """Options of a convolution on two or four channels."""
    dilation = draw(st.sampled_from([1, 1, 2]))
    return {
        "filters": 2 * draw(st.integers(1, 2)),
        "kernel_size": (draw(st.integers(1, 3)), draw(st.integers(1, 3))),
        "strides": 1 if dilation > 1 else draw(st.integers(1, 3)),
        "dilation_rate": dilation,
        "padding": draw(st.sampled_from(["same", "valid"])),
        "groups": draw(st.sampled_from([1, 2])),
        "use_bias": draw(st.booleans()),
        "activation": draw(st.sampled_from([None, "relu", "tanh", "gelu"])),
    }


@st.composite
def networks(draw):
    """A description of a small network."""
    return {
        "shape": (draw(st.integers(5, 7)), draw(st.integers(5, 7)), 2),
        "convolutions": draw(st.lists(convolutions(), max_size=2)),
        "normalise": draw(st.booleans()),
        "dropout": draw(st.booleans()),
        "hidden": draw(st.lists(st.integers(1, 5), max_size=2)),
        "outputs": draw(st.integers(2, 4)),
        "loss": draw(st.sampled_from(LOSSES)),
        "policy": draw(st.sampled_from(POLICIES)),
    }


@st.composite
def optimizers(draw):
    """Arguments of KFC, most of them legal extremes."""
    return {
        "learning_rate": draw(st.sampled_from([0.0, 0.05, 1.0])),
        "damping": draw(st.sampled_from([0.0, 1e-6, 0.2, 1e4])),
        "momentum": draw(st.sampled_from([0.0, 0.9])),
        "polyak_scaling": draw(st.sampled_from([None, 1.0])),
        "norm_constraint": draw(st.sampled_from([None, 5e-4])),
        "fisher": draw(st.sampled_from(["sampled", "empirical", "exact"])),
        "curvature_update_period": draw(st.integers(1, 3)),
        "inverse_update_period": draw(st.integers(1, 3)),
        "factor_batch_size": draw(st.sampled_from([None, 1, 3])),
        "max_factor_dim": draw(st.sampled_from([None, 1, 7])),
    }


batches = st.lists(
    st.tuples(
        st.integers(1, 7),  # examples
        st.sampled_from([0.0, 1e-30, 1e-6, 1.0, 1.0, 1e6, 1e30]),  # scale
        st.sampled_from([None, None, None, np.nan, np.inf, -np.inf]),  # one broken number
        st.integers(0, 2**16),  # seed
    ),
    min_size=1,
    max_size=4,
)


def build(layers, network):
    keras.backend.clear_session(free_memory=False)
    keras.utils.set_random_seed(1)
    stack = [keras.Input(network["shape"])]
    for options in network["convolutions"]:
        stack.append(layers.Conv2D(**options))
    if network["normalise"]:
        stack.append(keras.layers.BatchNormalization())
    stack.append(keras.layers.Flatten())
    for units in network["hidden"]:
        stack.append(layers.Dense(units, activation="relu"))
    if network["dropout"]:
        stack.append(keras.layers.Dropout(0.5, seed=1))
    head = HEADS.get(network["loss"], "softmax")
    stack.append(layers.Dense(network["outputs"], activation=head, dtype="float32"))
    return keras.Sequential(stack)


def batch(network, examples, scale, broken, seed):
    rng = np.random.default_rng(seed)
    x = (scale * rng.normal(size=(examples, *network["shape"]))).astype("float32")
    if broken is not None:
        x[0, 0, 0, 0] = broken
    outputs, loss = network["outputs"], network["loss"]
    if loss == "sparse_categorical_crossentropy":
        return x, rng.integers(0, outputs, size=examples)
    if loss == "categorical_crossentropy":
        return x, np.eye(outputs, dtype="float32")[rng.integers(0, outputs, size=examples)]
    if loss == "binary_crossentropy":
        return x, rng.integers(0, 2, size=(examples, outputs)).astype("float32")
    return x, (scale * rng.normal(size=(examples, outputs))).astype("float32")


def finite_after(model, optimizer, network, drawn):
    """For each variable of the model, whether it is finite after the batches."""
    model.compile(optimizer, network["loss"], run_eagerly=True)
    for description in drawn:
        model.train_on_batch(*batch(network, *description))
    return [bool(np.isfinite(np.asarray(v, "float64")).all()) for v in model.variables]


def fits(network):
    """Whether every convolution has at least one position."""
    height, width, _ = network["shape"]
    for options in network["convolutions"]:
        for axis in (0, 1):
            size = height if axis == 0 else width
            extent = options["dilation_rate"] * (options["kernel_size"][axis] - 1) + 1
            if options["padding"] == "valid" and size < extent:
                return False
            reach = size if options["padding"] == "same" else size - extent + 1
            size = -(-reach // options["strides"])
            height, width = (size, width) if axis == 0 else (height, size)
    return True


@pytest.mark.nightly
@settings(fuzz, max_examples=10)
@given(networks(), optimizers(), batches)
def test_training_survives_what_sgd_survives(network, arguments, drawn):
    assume(fits(network))
    # Where nothing bounds it, KFC takes the step it is told to.
    bounded = arguments["norm_constraint"] is not None or arguments["polyak_scaling"] is not None
    assume(bounded or arguments["learning_rate"] <= 0.05)
    keras.config.set_dtype_policy(network["policy"])
    survived = finite_after(
        build(keras.layers, network), keras.optimizers.SGD(1e-3), network, drawn
    )
    model = build(keras_kfc.layers, network)
    finite = finite_after(model, KFC(seed=1, **arguments), network, drawn)
    for variable in model.optimizer.variables:
        assert np.isfinite(np.asarray(variable, "float64")).all(), variable.path
    for variable, ours, theirs in zip(
        build(keras.layers, network).variables, finite, survived, strict=True
    ):
        assert ours or not theirs, variable.path


anything = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=5),
    st.binary(max_size=3),
    st.lists(st.floats(), max_size=2),
    st.dictionaries(st.text(max_size=2), st.integers(), max_size=1),
    st.complex_numbers(),
    st.builds(object),
    st.sampled_from(
        [np.float32(0.1), np.int64(3), np.array(0.5), np.array([1, 2]), KFC, keras.Input]
    ),
)
ARGUMENTS = [name for name in inspect.signature(KFC).parameters if name != "kwargs"]


@pytest.mark.parametrize("name", ARGUMENTS)
@settings(fuzz, max_examples=40)
@given(value=anything)
@example(value=keras.optimizers.schedules.ExponentialDecay(0.1, 5, 0.5))
@example(value=-1)
@example(value=0)
@example(value=10**400)
def test_arguments_are_taken_or_refused_by_name(name, value):
    try:
        optimizer = KFC(**{name: value})
    except (ValueError, TypeError) as error:
        assert re.search(rf"`{name}`|{name}=", str(error))
        return
    if not (callable(value) and name == "learning_rate"):
        config = optimizer.get_config()
        assert KFC.from_config(config).get_config() == config


@settings(fuzz, max_examples=60)
@given(value=anything)
def test_functions_of_models_refuse_everything_else_by_name(value):
    for function in (keras_kfc.instrument, keras_kfc.strip, keras_kfc.coverage):
        with pytest.raises(TypeError, match="Argument `model` must be an instance"):
            function(value)


@settings(fuzz, max_examples=60)
@given(value=anything)
def test_excluded_layers_must_be_names(value):
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1, name="head")])
    try:
        keras_kfc.instrument(model, exclude=value)
    except (ValueError, TypeError) as error:
        assert "`exclude`" in str(error)
        assert type(model.layers[0]) is keras.layers.Dense
    else:
        # An empty collection, and nothing else, excludes nothing.
        assert not list(value)
