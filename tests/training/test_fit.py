"""Data, callbacks and calls that Keras's `fit` knows: KFC trains with them as without."""

import csv

import keras
import nets
import numpy as np
import pytest
import tensorflow as tf
from helpers import few

import keras_kfc
from keras_kfc import KFC

LOSS = "sparse_categorical_crossentropy"


def compiled(optimizer=None, **kwargs):
    keras.backend.clear_session(free_memory=False)
    keras.utils.set_random_seed(4)
    model = keras.Sequential(
        [
            keras.Input((6,)),
            keras_kfc.layers.Dense(5, activation="tanh", name="hidden"),
            keras.layers.BatchNormalization(name="norm"),
            keras.layers.Dropout(0.2, seed=1),
            keras_kfc.layers.Dense(3, activation="softmax", name="head"),
        ]
    )
    optimizer = KFC(seed=3, inverse_update_period=3) if optimizer is None else optimizer
    model.compile(optimizer, LOSS, **kwargs)
    nets.build_optimizer(model)
    return model


def data(examples=48):
    rng = np.random.default_rng(5)
    labels = rng.integers(0, 3, size=examples)
    centres = rng.normal(size=(3, 6))
    return (centres[labels] + rng.normal(size=(examples, 6))).astype("float32"), labels


def fit(model, x=None, y=None, **kwargs):
    if x is None:
        x, y = data()
        kwargs = {"batch_size": 16, "shuffle": False, **kwargs}
    model.fit(x, y, **{"epochs": 2, "verbose": 0, **kwargs})
    return model


def assert_equal_weights(model, expected):
    """To float precision of the largest: sums of several threads round differently each time."""
    expected = nets.flat_weights(expected)
    np.testing.assert_allclose(
        nets.flat_weights(model), expected, rtol=0, atol=1e-5 * np.abs(expected).max()
    )


@pytest.fixture(scope="module")
def reference():
    return fit(compiled())


class Batches(keras.utils.PyDataset):
    def __len__(self):
        return 3

    def __getitem__(self, index):
        x, y = data()
        return x[16 * index : 16 * index + 16], y[16 * index : 16 * index + 16]


def dataset():
    return tf.data.Dataset.from_tensor_slices(data()).batch(16).prefetch(1)


def generator():
    while True:
        yield from (Batches()[index] for index in range(3))


@pytest.mark.nightly
def test_datasets_generators_and_arrays_train_alike(reference):
    assert_equal_weights(fit(compiled(), dataset()), reference)
    assert_equal_weights(fit(compiled(), Batches(), shuffle=False), reference)
    assert_equal_weights(fit(compiled(), generator(), steps_per_epoch=3), reference)


def test_train_on_batch_is_a_step_of_fit(reference):
    model = compiled()
    for _ in range(2):
        for x, y in dataset():
            model.train_on_batch(x, y)
    assert_equal_weights(model, reference)


@pytest.mark.nightly
def test_validation_and_prediction_between_epochs_change_nothing(reference):
    class Predict(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            self.model.predict(data()[0], verbose=0)

    model = fit(compiled(), validation_data=data(), callbacks=[Predict()])
    assert_equal_weights(model, reference)


@pytest.mark.nightly
def test_callbacks_that_only_watch_change_nothing(reference, tmp_path):
    model = compiled(metrics=["accuracy"])
    callbacks = [
        # First, because it puts the learning rate into the logs.
        keras.callbacks.ReduceLROnPlateau(monitor="loss", patience=50),
        keras.callbacks.CSVLogger(tmp_path / "log.csv"),
        keras.callbacks.TensorBoard(tmp_path / "board", histogram_freq=1, update_freq=1),
        keras.callbacks.ModelCheckpoint(tmp_path / "best.keras", save_best_only=True),
        keras.callbacks.EarlyStopping(monitor="loss", patience=5),
        keras.callbacks.TerminateOnNaN(),
        keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: None),
    ]
    fit(model, validation_data=data(), callbacks=callbacks)
    assert_equal_weights(model, reference)
    with open(tmp_path / "log.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 and float(rows[1]["loss"]) > 0
    assert float(rows[1]["learning_rate"]) == pytest.approx(0.03)
    assert list((tmp_path / "board").rglob("events*"))


@pytest.mark.slow
def test_learning_rate_callbacks_do_what_a_schedule_does():
    callback = keras.callbacks.LearningRateScheduler(lambda epoch: [0.03, 0.001][epoch])
    # The first value belongs to steps 0, 1 and 2, the first epoch.
    schedule = keras.optimizers.schedules.PiecewiseConstantDecay([2], [0.03, 0.001])
    expected = fit(compiled(KFC(learning_rate=schedule, seed=3)))
    assert_equal_weights(fit(compiled(KFC(seed=3)), callbacks=[callback]), expected)


@pytest.mark.nightly
def test_reducing_on_a_plateau_takes_effect(reference):
    callback = keras.callbacks.ReduceLROnPlateau(
        monitor="loss", min_delta=100.0, patience=1, factor=0.1
    )
    model, steady = compiled(), compiled()
    history = model.fit(*data(), epochs=4, shuffle=False, verbose=0, callbacks=[callback])
    rates = history.history["learning_rate"]
    assert rates[0] == pytest.approx(0.03) and rates[-1] < 0.0031
    steady.fit(*data(), epochs=4, shuffle=False, verbose=0)
    # One more epoch, with and without: steps are shorter, but for the momentum of before.
    moved = []
    for trained in (model, steady):
        before = nets.flat_weights(trained)
        trained.fit(*data(), epochs=1, shuffle=False, verbose=0)
        moved.append(np.linalg.norm(nets.flat_weights(trained) - before))
    assert moved[0] < 0.5 * moved[1]


@pytest.mark.slow
def test_early_stopping_restores_the_best_weights():
    model = compiled()
    x, y = data()
    stopping = keras.callbacks.EarlyStopping(
        monitor="val_loss", patience=1, restore_best_weights=True
    )
    kept = []
    keep = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: kept.append(nets.flat_weights(model))
    )
    history = model.fit(
        x, y, validation_data=(x, (y + 1) % 3), epochs=9, verbose=0, callbacks=[keep, stopping]
    )
    assert len(history.epoch) < 9
    best = kept[int(np.argmin(history.history["val_loss"]))]
    np.testing.assert_array_equal(nets.flat_weights(model), best)


def test_terminate_on_nan_stops_and_the_weights_stay_finite():
    x, y = data()
    x[20] = np.nan
    model = compiled(metrics=["accuracy"])
    # Without batch norm's statistics, which Keras itself updates with the NaN.
    history = model.fit(
        x,
        y,
        batch_size=16,
        shuffle=False,
        epochs=5,
        verbose=0,
        callbacks=[keras.callbacks.TerminateOnNaN()],
    )
    assert len(history.epoch) == 1
    assert all(np.isfinite(v.numpy()).all() for v in model.trainable_variables)
    assert int(model.optimizer.skipped_steps) == 1


@pytest.mark.nightly
def test_class_weights_are_sample_weights_and_repetitions():
    x, y = data()
    by_class = fit(compiled(), class_weight={0: 2.0, 1: 1.0, 2: 0.0})
    weights = np.array([2.0, 1.0, 0.0])[y]
    by_sample = compiled()
    by_sample.fit(x, y, sample_weight=weights, batch_size=16, shuffle=False, epochs=2, verbose=0)
    assert_equal_weights(by_class, by_sample)
    plain = fit(compiled())
    with pytest.raises(AssertionError):
        assert_equal_weights(by_class, plain)


def test_moving_statistics_are_updated_once_a_step():
    """As many updates as under SGD, on due steps and on others."""
    still = compiled(KFC(learning_rate=1e-12, adam_lr_ratio=0.0))
    expected = compiled(keras.optimizers.SGD(0.0))
    for model in (still, expected):
        fit(model, epochs=4)
    for actual, wanted in zip(
        still.non_trainable_variables, expected.non_trainable_variables, strict=True
    ):
        np.testing.assert_allclose(actual.numpy(), wanted.numpy(), rtol=1e-4, atol=1e-6)


def test_both_backward_passes_see_one_dropout_mask():
    """With one example, a dropped unit has neither a gradient nor a row in gamma."""
    keras.utils.set_random_seed(4)
    model = keras.Sequential(
        [
            keras.Input((6,)),
            keras_kfc.layers.Dense(40, name="hidden"),
            keras.layers.Dropout(0.5),
            keras_kfc.layers.Dense(3, activation="softmax", name="head"),
        ]
    )
    model.compile(KFC(fisher="exact", weight_decay=None), LOSS)
    before = model.get_layer("hidden").get_weights()[0]
    x, y = data(1)
    model.train_on_batch(x, y)
    block = model.optimizer.blocks[0]
    in_gamma = np.abs(np.asarray(block.gamma)[0]).sum(0) > 0
    in_gradient = np.abs(model.get_layer("hidden").get_weights()[0] - before).sum(0) > 0
    np.testing.assert_array_equal(in_gamma, in_gradient)
    assert 5 < in_gamma.sum() < 35
    # The mask of the layer above: inputs that were dropped have no row in omega.
    in_omega = np.diag(np.asarray(model.optimizer.blocks[1].omega)[0])[:-1] > 0
    np.testing.assert_array_equal(in_omega, in_gamma)


@pytest.mark.nightly
def test_trainable_toggled_between_compiles():
    model = fit(compiled())
    hidden = model.get_layer("hidden")
    hidden.trainable = False
    model.compile(KFC(seed=3), LOSS)
    frozen = hidden.get_weights()
    fit(model)
    assert [block.path.split("/")[-1] for block in model.optimizer.blocks] == ["head"]
    for before, after in zip(frozen, hidden.get_weights(), strict=True):
        np.testing.assert_array_equal(before, after)
    hidden.trainable = True
    model.compile(KFC(seed=3), LOSS)
    fit(model)
    assert len(model.optimizer.blocks) == 2
    assert np.abs(hidden.get_weights()[0] - frozen[0]).max() > 0


@pytest.mark.slow
@pytest.mark.parametrize("step", few(["polyak", "quadratic"], 1))
def test_validation_sees_averaged_weights_if_asked(step):
    """The average is NumPy's, of the weights after each step; training goes on from the others."""
    x, y = data()
    losses = {}
    for averaged in (True, False):
        model = compiled(KFC(seed=3, step=step, use_ema=True, ema_momentum=0.9))
        average = [v.numpy().astype("float64") for v in model.trainable_variables]
        seen = []

        def note(batch, logs, model=model, average=average, seen=seen):
            now = [v.numpy().astype("float64") for v in model.trainable_variables]
            for index, value in enumerate(now):
                # The first step's weights start the average.
                share = 0.1 if seen else 1.0
                average[index] += share * (value - average[index])
            seen.append(1)

        callbacks = [keras.callbacks.LambdaCallback(on_train_batch_end=note)]
        callbacks += [keras.callbacks.SwapEMAWeights()] * averaged
        history = model.fit(
            x, y, batch_size=16, epochs=2, validation_data=(x, y), verbose=0, callbacks=callbacks
        )
        losses[averaged] = history.history["val_loss"][-1]
        for variable, value in zip(model.trainable_variables, average, strict=True):
            variable.assign(value)
        assert model.evaluate(x, y, verbose=0) == pytest.approx(losses[True], rel=1e-4)
    assert losses[False] != pytest.approx(losses[True], rel=1e-2)
