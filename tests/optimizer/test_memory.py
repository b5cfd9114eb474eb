"""Memory usage is what the variables really take, before and after they exist."""

import keras
import nets
import pytest
import tensorflow as tf

import keras_kfc
from keras_kfc import KFC


def really_taken(optimizer):
    return sum(variable.numpy().nbytes for variable in optimizer.variables)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_ema": True, "gradient_accumulation_steps": 2},
        {"max_factor_dim": 20},
        pytest.param({"structure": "eigenbasis"}, marks=pytest.mark.nightly),
        pytest.param({"step": "quadratic"}, marks=pytest.mark.nightly),
    ],
    ids=["plain", "copies", "cut", "eigenbasis", "quadratic"],
)
@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16", "bfloat16", "float64"])
def test_total_is_the_size_of_all_variables(options, policy):
    keras.config.set_dtype_policy(policy)
    model = nets.conv_net()
    optimizer = KFC(**options)
    planned = optimizer.memory_usage(model.trainable_variables)
    optimizer.build(model.trainable_variables)
    usage = optimizer.memory_usage()
    assert planned.total == usage.total == really_taken(optimizer)
    assert planned.entries == usage.entries


def test_each_layer_has_its_dimensions_and_sizes():
    model = nets.conv_net()
    usage = KFC().memory_usage(model.trainable_variables)
    conv, dense, norm = usage.entries
    assert conv.path == "sequential/conv"
    assert conv.shapes == {"omega": (1, 19, 19), "gamma": (1, 4, 4)}
    assert dense.shapes == {"omega": (1, 65, 65), "gamma": (1, 3, 3)}
    assert conv.inverses == 4 * (19**2 + 4**2)
    assert conv.momenta == 4 * (3 * 3 * 2 * 4 + 4)
    assert norm.shapes == {} and norm.inverses == 0 and norm.momenta == 2 * 4 * 8
    text = str(usage)
    for part in ("sequential/conv", "19 x 19", "65 x 65", "sequential/norm", "none", "altogether"):
        assert part in text


def test_a_wide_network_is_told_before_it_is_built():
    """The dense layers of a VGG: 25,089 rows would take gigabytes, which nobody allocates here."""
    model = keras.Sequential([keras.Input((64,)), keras_kfc.layers.Dense(100)])
    wide = keras.Sequential([keras.Input((25_088,)), keras_kfc.layers.Dense(10)])
    usage = KFC(max_factor_dim=None).memory_usage(wide.trainable_variables)
    assert usage.total > 5e9
    assert "4.7 GiB" in str(usage)
    assert KFC().memory_usage(wide.trainable_variables).total < 6e8
    assert KFC().memory_usage(model.trainable_variables).total < 2e5


def test_an_optimizer_without_variables_says_what_it_needs():
    with pytest.raises(ValueError, match=r"`variables` is needed.*Received: variables=None"):
        KFC().memory_usage()
    with pytest.raises(TypeError, match=r"`variables` must be a list.*Received: variables="):
        KFC().memory_usage(nets.conv_net())


def test_a_built_optimizer_tells_what_it_holds_whatever_became_of_the_layers():
    model = nets.conv_net()
    optimizer = KFC()
    optimizer.build(model.trainable_variables)
    keras_kfc.strip(model)
    assert optimizer.memory_usage().total == really_taken(optimizer)


def test_plain_variables_of_tensorflow_count():
    variable = tf.Variable(tf.zeros((3, 4)))
    optimizer = KFC()
    optimizer.build([variable])
    assert optimizer.memory_usage().total == really_taken(optimizer)
