"""Training that was saved and resumed equals training that was never interrupted.

Everything goes through Keras's own ways of saving. The optimizer draws the targets of the sampled
Fisher matrix, so that equality covers its random numbers, too.
"""

import signal

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import few, run_python
from resuming import SEED, compiled, default_optimizer, fit, stored_state

import keras_kfc


def assert_same_state(model, expected):
    """Weights and optimizer variables agree to float precision of their largest entry.

    Sums of several threads round differently each time, which shows most in small entries.
    """
    optimizer, reference = model.optimizer, expected.optimizer
    for variable, other in zip(
        [*model.variables, *optimizer.variables],
        [*expected.variables, *reference.variables],
        strict=True,
    ):
        expected = other.numpy()
        exact = np.issubdtype(expected.dtype, np.integer)
        tolerance = 0 if exact else 1e-5 * np.abs(expected).max(initial=0)
        np.testing.assert_allclose(
            variable.numpy(), expected, rtol=0, atol=tolerance, err_msg=other.path
        )


@pytest.fixture(scope="module")
def uninterrupted():
    model = compiled()
    fit(model, 4)
    return model


def by_keras_file(model, tmp_path):
    model.save(tmp_path / "model.keras")
    return keras.saving.load_model(tmp_path / "model.keras")


def by_weights_file(model, tmp_path):
    model.save_weights(tmp_path / "model.weights.h5")
    fresh = compiled()
    fresh.optimizer.build(fresh.trainable_variables)
    fresh.load_weights(tmp_path / "model.weights.h5")
    return fresh


def by_checkpoint_object(model, tmp_path):
    path = tf.train.Checkpoint(model=model, optimizer=model.optimizer).save(tmp_path / "ckpt")
    fresh = compiled()
    fresh.optimizer.build(fresh.trainable_variables)
    checkpoint = tf.train.Checkpoint(model=fresh, optimizer=fresh.optimizer)
    checkpoint.restore(path).assert_consumed()
    return fresh


WAYS = [by_keras_file, by_checkpoint_object, by_weights_file]
MARKS = [(), pytest.mark.slow, pytest.mark.nightly]


@pytest.mark.parametrize(
    "way", [pytest.param(way, marks=marks) for way, marks in zip(WAYS, MARKS, strict=True)]
)
def test_two_epochs_and_two_more_are_four(way, uninterrupted, tmp_path):
    model = compiled()
    fit(model, 2)
    resumed = way(model, tmp_path)
    assert resumed is not model
    fit(resumed, 4, first=2)
    assert_same_state(resumed, uninterrupted)


@pytest.mark.slow
def test_another_seed_would_show(uninterrupted, tmp_path):
    """Negative control: the random draws matter."""
    model = compiled()
    fit(model, 2)
    model.optimizer.draw_seed.assign(SEED + 1)
    fit(model, 4, first=2)
    with pytest.raises(AssertionError):
        assert_same_state(model, uninterrupted)


@pytest.mark.slow
def test_state_loaded_before_the_optimizer_is_built_waits_for_it(uninterrupted, tmp_path):
    model = compiled()
    fit(model, 2)
    model.save_weights(tmp_path / "model.weights.h5")
    fresh = compiled()
    assert not fresh.optimizer.built
    fresh.load_weights(tmp_path / "model.weights.h5")
    fit(fresh, 4, first=2)
    assert_same_state(fresh, uninterrupted)


@pytest.mark.nightly
def test_a_checkpoint_restored_before_the_optimizer_is_built_waits_for_it(uninterrupted, tmp_path):
    model = compiled()
    fit(model, 2)
    path = tf.train.Checkpoint(model=model, optimizer=model.optimizer).save(tmp_path / "ckpt")
    fresh = compiled()
    status = tf.train.Checkpoint(model=fresh, optimizer=fresh.optimizer).restore(path)
    fit(fresh, 4, first=2)
    status.assert_consumed()
    assert_same_state(fresh, uninterrupted)


@keras.saving.register_keras_serializable(package="keras_kfc_tests")
class OwnModel(keras.Model):
    """Its layers live in a class of its own, which saves nothing of their classes."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.conv = keras.layers.Conv2D(4, 3, strides=2, padding="same")
        self.head = keras.layers.Dense(3, activation="softmax")

    def call(self, inputs):
        hidden = keras.ops.relu(self.conv(inputs))
        return self.head(keras.ops.reshape(hidden, (-1, 64)))


def own_model(**kwargs):
    keras.utils.set_random_seed(1)
    model = keras_kfc.instrument(OwnModel())
    model.compile(optimizer=default_optimizer(), loss="sparse_categorical_crossentropy", **kwargs)
    model(np.zeros((1, 8, 8, 2)))
    return model


@pytest.mark.nightly
def test_state_of_layers_in_a_class_of_ones_own_waits_for_instrument(tmp_path):
    expected = own_model()
    fit(expected, 4)
    model = own_model()
    fit(model, 2)
    model.save(tmp_path / "model.keras")
    with pytest.warns(UserWarning, match="instrument"):
        loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert not loaded.optimizer.blocks
    # What waits is stored again by whoever only loads and saves.
    loaded.save(tmp_path / "again.keras")
    with pytest.warns(UserWarning, match="instrument"):
        loaded = keras.saving.load_model(tmp_path / "again.keras")
    fit(keras_kfc.instrument(loaded), 4, first=2)
    assert len(loaded.optimizer.blocks) == 2
    assert_same_state(loaded, expected)
    # An optimizer that was built again can be saved in every way.
    tf.train.Checkpoint(model=loaded, optimizer=loaded.optimizer).save(tmp_path / "ckpt")
    loaded.export(tmp_path / "export", verbose=False)
    loaded.save(tmp_path / "end.keras")


@pytest.mark.nightly
def test_state_that_waits_does_not_undo_training_without_it():
    source, model = own_model(), own_model()
    fit(source, 2)
    keras_kfc.strip(model)
    model.compile(default_optimizer(), "sparse_categorical_crossentropy")
    fit(model, 1)
    with pytest.warns(UserWarning, match="instrument"):
        model.optimizer.load_own_variables(stored_state(source.optimizer))
    fit(model, 1)
    steps = int(model.optimizer.iterations)
    assert steps == 6
    assert int(stored_state(model.optimizer)["0"]) == steps
    keras_kfc.instrument(model)
    assert int(model.optimizer.iterations) == steps


@pytest.mark.nightly
def test_the_last_state_that_was_loaded_counts():
    trained, fresh = compiled(), compiled(optimizer=keras_kfc.KFC(seed=9))
    fit(trained, 1)
    model = compiled()
    model.optimizer.load_own_variables(stored_state(trained.optimizer))
    model.optimizer.load_own_variables(stored_state(fresh.optimizer))
    model.optimizer.build(model.trainable_variables)
    assert int(model.optimizer.draw_seed) == 9 and int(model.optimizer.iterations) == 0


@pytest.mark.nightly
def test_a_model_checkpoint_of_the_second_epoch_resumes(uninterrupted, tmp_path):
    model = compiled()
    callback = keras.callbacks.ModelCheckpoint(tmp_path / "{epoch}.keras")
    fit(model, 3, callbacks=[callback])
    resumed = keras.saving.load_model(tmp_path / "2.keras")
    fit(resumed, 4, first=2)
    assert_same_state(resumed, uninterrupted)


# Kills itself with SIGKILL in the third epoch, if told to.
SCRIPT = """
import os, pathlib, signal, sys
import keras
import nets
import test_saving

class Kill(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        if self.model.optimizer.iterations.numpy() == 8:
            os.kill(os.getpid(), signal.SIGKILL)

folder = pathlib.Path(sys.argv[1])
callbacks = [keras.callbacks.BackupAndRestore(folder / "backup")]
if sys.argv[2] == "kill":
    callbacks.append(Kill())
model = test_saving.compiled()
history = test_saving.fit(model, 4, callbacks=callbacks)
print("epochs", history.epoch)
model.save(folder / "end.keras")
"""


@pytest.mark.nightly
def test_training_goes_on_after_a_kill_in_mid_epoch(uninterrupted, tmp_path):
    killed = run_python(SCRIPT, tmp_path, "kill")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (tmp_path / "end.keras").exists()
    resumed = run_python(SCRIPT, tmp_path, "finish")
    assert resumed.returncode == 0, resumed.stderr
    assert "epochs [2, 3]" in resumed.stdout
    assert_same_state(keras.saving.load_model(tmp_path / "end.keras"), uninterrupted)


@pytest.mark.nightly
@pytest.mark.parametrize("policy", few(["mixed_float16", "float64"], 1))
def test_resuming_under_another_dtype_policy(policy, tmp_path):
    keras.config.set_dtype_policy(policy)
    keras.config.set_floatx("float64" if policy == "float64" else "float32")
    expected = compiled()
    fit(expected, 4)
    model = compiled()
    fit(model, 2)
    model.save(tmp_path / "model.keras")
    resumed = keras.saving.load_model(tmp_path / "model.keras")
    fit(resumed, 4, first=2)
    assert_same_state(resumed, expected)


@pytest.mark.nightly
def test_resuming_with_all_of_keras_optimizer_state(tmp_path):
    """EMA, gradient accumulation and schedules have variables of their own."""

    def optimizer():
        schedule = keras.optimizers.schedules.ExponentialDecay
        return default_optimizer(
            learning_rate=schedule(0.05, 2, 0.9),
            damping=schedule(0.3, 2, 0.9),
            use_ema=True,
            gradient_accumulation_steps=2,
        )

    model = compiled(optimizer=optimizer())
    fit(model, 2)
    # At its end, `fit` overwrites the weights by their average: four epochs are other ones.
    resumed = by_keras_file(model, tmp_path)
    fit(model, 4, first=2)
    fit(resumed, 4, first=2)
    assert_same_state(resumed, model)


def test_state_of_an_optimizer_before_its_first_step(tmp_path):
    model = compiled()
    model.save_weights(tmp_path / "model.weights.h5")
    fresh = compiled(optimizer=keras_kfc.KFC(seed=1))
    fresh.optimizer.build(fresh.trainable_variables)
    fresh.load_weights(tmp_path / "model.weights.h5")
    assert int(fresh.optimizer.draw_seed) == SEED
