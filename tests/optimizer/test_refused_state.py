"""State of another optimizer, network or setting is refused or skipped, and says so."""

import json

import keras
import nets
import numpy as np
import pytest
from resuming import compiled, default_optimizer, fit, stored_state

import keras_kfc
from keras_kfc.optimizer.archive import FORMAT_VERSION


def decaying():
    return keras.optimizers.schedules.ExponentialDecay(0.1, 5, 0.5)


@pytest.mark.parametrize(
    ("stored", "own", "message"),
    [
        ({"damping": decaying()}, {"learning_rate": decaying()}, "a variable for damping"),
        ({"gradient_accumulation_steps": 2}, {"use_ema": True}, "a variable for average"),
    ],
)
def test_variables_of_another_meaning_are_refused(stored, own, message):
    """Their number and shapes are equal."""
    first, second = (compiled(optimizer=default_optimizer(**kw)) for kw in (stored, own))
    for model in (first, second):
        model.optimizer.build(model.trainable_variables)
    assert len(first.optimizer.variables) == len(second.optimizer.variables)
    with pytest.raises(ValueError, match=message):
        second.optimizer.load_own_variables(stored_state(first.optimizer))


def test_state_of_a_newer_format_is_refused():
    model = compiled()
    model.optimizer.build(model.trainable_variables)
    store = stored_state(model.optimizer)
    layout = json.loads(store["layout"].tobytes())
    assert layout["version"] == FORMAT_VERSION
    layout["version"] += 1
    store["layout"] = np.frombuffer(json.dumps(layout).encode(), "uint8")
    newer = rf"newer format.*at most {FORMAT_VERSION}\. Received: {FORMAT_VERSION + 1}"
    with pytest.raises(ValueError, match=newer):
        model.optimizer.load_own_variables(store)


def test_blocks_of_other_layers_of_the_same_shape_are_refused():
    def excluding(name):
        layers = [keras.layers.Dense(4, name=each) for each in ("a", "b")]
        model = keras_kfc.instrument(keras.Sequential([keras.Input((4,)), *layers]), exclude=[name])
        model.compile(default_optimizer(), "mse")
        model.optimizer.build(model.trainable_variables)
        return model.optimizer

    with pytest.raises(ValueError, match="other layers or settings"):
        excluding("b").load_own_variables(stored_state(excluding("a")))


@pytest.mark.slow
def test_state_of_another_optimizer_is_skipped_with_a_warning(tmp_path):
    model = compiled(optimizer="adam")
    fit(model, 1)
    model.save_weights(tmp_path / "adam.weights.h5")
    fresh = compiled()
    fresh.optimizer.build(fresh.trainable_variables)
    with pytest.warns(UserWarning, match="another optimizer"):
        fresh.load_weights(tmp_path / "adam.weights.h5")
    assert int(fresh.optimizer.iterations) == 0
    np.testing.assert_array_equal(nets.flat_weights(fresh), nets.flat_weights(model))
    fit(fresh, 1)
    fresh.save_weights(tmp_path / "kfc.weights.h5")
    with pytest.warns(UserWarning, match="Skipping variable loading"):
        model.load_weights(tmp_path / "kfc.weights.h5")


def test_state_of_other_settings_is_refused_and_changes_nothing(tmp_path):
    model = compiled()
    fit(model, 1)
    model.save_weights(tmp_path / "model.weights.h5")
    fresh = compiled(optimizer=default_optimizer(max_factor_dim=32))
    fresh.optimizer.build(fresh.trainable_variables)
    before = [variable.numpy() for variable in fresh.optimizer.variables]
    with pytest.raises(ValueError, match=r"shapes of the factors .* for layer .*dense"):
        fresh.optimizer.load_own_variables(stored_state(model.optimizer))
    for variable, value in zip(fresh.optimizer.variables, before, strict=True):
        np.testing.assert_array_equal(variable.numpy(), value)
    fresh = compiled(optimizer=default_optimizer(use_ema=True))
    fresh.optimizer.build(fresh.trainable_variables)
    with pytest.warns(UserWarning, match="variables and 2 Kronecker blocks"):
        fresh.load_weights(tmp_path / "model.weights.h5")


def test_state_of_another_network_is_refused():
    small, other = (
        keras.Sequential(
            [keras.Input((4,)), keras_kfc.layers.Dense(units), keras_kfc.layers.Dense(2)]
        )
        for units in (3, 5)
    )
    for model in (small, other):
        model.compile(optimizer=default_optimizer(), loss="mse")
        model.optimizer.build(model.trainable_variables)
    with pytest.raises(ValueError, match="other layers or settings"):
        other.optimizer.load_own_variables(stored_state(small.optimizer))


@pytest.mark.parametrize("version", [2, FORMAT_VERSION])
def test_factors_that_were_measured_in_another_setting_are_measured_anew(version):
    """Momenta and averages go on; numbers that mean something else do not."""
    trained, other = (
        compiled(optimizer=default_optimizer(weight_sharing=setting))
        for setting in ("expand", None)
    )
    fit(trained, epochs=1)
    other.set_weights(trained.get_weights())
    other.optimizer.build(other.trainable_variables)
    store = stored_state(trained.optimizer)
    if version == 2:
        layout = json.loads(store["layout"].tobytes())
        for block in layout["blocks"]:
            del block["weight_sharing"]
        store["layout"] = np.frombuffer(json.dumps({**layout, "version": 2}).encode(), "uint8")
    other.optimizer.load_own_variables(store)
    settings = {b.layout.weight_sharing: float(b.ema_weight) for b in other.optimizer.blocks}
    assert settings["expand"] > 0 and settings["trace"] == 0
    for ours, theirs in zip(
        other.optimizer.parts.momentums, trained.optimizer.parts.momentums, strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)
    fit(other, epochs=2, first=1)
    assert all(float(block.ema_weight) > 0 for block in other.optimizer.blocks)
    # Negative control: in the same setting nothing is forgotten.
    again = compiled(optimizer=default_optimizer(weight_sharing="expand"))
    again.optimizer.build(again.trainable_variables)
    again.optimizer.load_own_variables(stored_state(trained.optimizer))
    assert all(float(block.ema_weight) > 0 for block in again.optimizer.blocks)
