"""Telemetry says what happened: every logged number against one computed by hand."""

import csv
import io

import keras
import nets
import numpy as np
import pytest
import tensorflow as tf
from helpers import few

import keras_kfc
from keras_kfc import KFC
from keras_kfc.monitor.callbacks import CurvatureMonitor

LOSS = "sparse_categorical_crossentropy"


def compiled(optimizer=None, **kwargs):
    keras.backend.clear_session(free_memory=False)
    model = nets.conv_net()
    model.compile(KFC(seed=3) if optimizer is None else optimizer, LOSS, **kwargs)
    nets.build_optimizer(model)
    return model


def fit(model, epochs=2, **kwargs):
    images, labels = nets.image_batch(36)
    settings = {"batch_size": 12, "shuffle": False, "verbose": 0, **kwargs}
    return model.fit(images, labels, epochs=epochs, **settings)


class Steps(keras.callbacks.Callback):
    """The weights after every step."""

    def on_train_begin(self, logs=None):
        self.weights = [self.now()]

    def on_train_batch_end(self, batch, logs=None):
        self.weights.append(self.now())

    def now(self):
        return np.concatenate([v.numpy().ravel() for v in self.model.trainable_variables])


@pytest.mark.slow
def test_watching_changes_nothing():
    plain, watched = compiled(), compiled()
    fit(plain)
    fit(watched, callbacks=[CurvatureMonitor("extremes")])
    np.testing.assert_allclose(nets.flat_weights(watched), nets.flat_weights(plain), rtol=1e-5)
    names = [[v.name for v in model.optimizer.variables] for model in (plain, watched)]
    assert names[0] == names[1]


@pytest.mark.parametrize(
    "options",
    few(
        [{}, pytest.param({"jit_compile": True}, marks=pytest.mark.nightly), {"run_eagerly": True}],
        1,
    ),
)
def test_norm_of_the_update_is_that_of_the_change_of_the_weights(options):
    model, steps = compiled(**options), Steps()
    history = fit(model, epochs=3, callbacks=[steps, CurvatureMonitor("none")]).history
    lengths = np.linalg.norm(np.diff(steps.weights, axis=0), axis=1).reshape(3, 3)
    np.testing.assert_allclose(history["update_norm"], lengths.mean(1), rtol=1e-3)


@pytest.mark.slow
def test_norm_of_the_gradient_is_that_of_the_gradients():
    model = compiled(KFC(learning_rate=1e-12, adam_lr_ratio=0.0))
    images, labels = nets.image_batch(36)
    norms = []
    for start in (0, 12, 24):
        with tf.GradientTape() as tape:
            outputs = model(images[start : start + 12], training=True)
            losses = keras.losses.sparse_categorical_crossentropy(
                labels[start : start + 12], outputs
            )
            loss = tf.reduce_mean(losses)
        norms.append(float(tf.linalg.global_norm(tape.gradient(loss, model.trainable_variables))))
    history = fit(model, epochs=1, callbacks=[CurvatureMonitor("none")]).history
    assert history["gradient_norm"][0] == pytest.approx(np.mean(norms), rel=1e-4)


@pytest.mark.slow
def test_trust_scale_is_the_share_of_the_step_that_is_taken():
    """Without momentum, a bounded step is the free step times the trust scale."""

    def first_step(norm_constraint):
        optimizer = KFC(
            momentum=0.0,
            fisher="exact",
            polyak_scaling=None,
            norm_constraint=norm_constraint,
            adam_lr_ratio=0.0,
            seed=3,
        )
        model = compiled(optimizer)
        history = fit(model, epochs=1, batch_size=36, callbacks=[CurvatureMonitor("none")]).history
        return history["update_norm"][0], history["step_scale"][0]

    (free, whole), (bounded, scale) = first_step(None), first_step(1e-5)
    assert whole == 1
    assert 0 < scale < 0.5
    assert bounded / free == pytest.approx(scale, rel=1e-4)


def test_spectra_are_those_of_the_factors():
    model = compiled()
    history = fit(model, callbacks=[CurvatureMonitor("extremes")]).history
    for block in model.optimizer.blocks:
        for name in ("omega", "gamma"):
            factor = np.asarray(getattr(block, name), "float64")[0]
            inverse = np.asarray(getattr(block, f"{name}_inverse"), "float64")[0]
            key = f"{block.path}/{name}"
            eigenvalues = np.sort(np.linalg.eig(factor)[0].real)
            largest = history[f"{key}_max"][-1]
            assert largest == pytest.approx(eigenvalues[-1], rel=1e-5)
            assert history[f"{key}_min"][-1] == pytest.approx(eigenvalues[0], abs=1e-5 * largest)
            singular = np.linalg.svd(inverse, compute_uv=False)
            expected = singular[0] / singular[-1]
            assert history[f"{key}_condition"][-1] == pytest.approx(expected, rel=1e-3)


@pytest.mark.slow
def test_condition_is_that_of_the_damped_factor():
    """More damping, better condition: the trace of damping in the log."""
    conditions = []
    for damping in (1e-3, 10.0):
        history = fit(
            compiled(KFC(damping=damping, seed=3)), callbacks=[CurvatureMonitor()]
        ).history
        conditions.append([v[-1] for name, v in history.items() if name.endswith("_condition")])
        assert history["damping"][-1] == pytest.approx(damping)
    for little, much in zip(*conditions, strict=True):
        assert little > 1.5 * much
    assert len(conditions[0]) == 4


def test_logs_reach_history_progress_bar_csv_and_tensorboard(tmp_path, capsys):
    schedule = keras.optimizers.schedules.PiecewiseConstantDecay([2], [0.2, 0.4])
    model = compiled(KFC(damping=schedule, learning_rate=0.02))
    callbacks = [
        CurvatureMonitor(),
        keras.callbacks.CSVLogger(tmp_path / "log.csv"),
        keras.callbacks.TensorBoard(tmp_path / "board"),
    ]
    history = fit(model, verbose=2, callbacks=callbacks).history
    printed = capsys.readouterr().out
    assert history["damping"] == pytest.approx([0.4, 0.4])
    assert history["learning_rate"] == pytest.approx([0.02, 0.02])
    assert history["skipped_steps"] == [0, 0]
    rows = list(csv.DictReader(io.StringIO((tmp_path / "log.csv").read_text())))
    for name in ("step_scale", "gradient_norm", "update_norm", "sequential/conv/omega_condition"):
        assert [float(row[name]) for row in rows] == pytest.approx(history[name])
        assert name in printed
    (events,) = (tmp_path / "board" / "train").glob("events*")
    tags = {
        value.tag
        for event in tf.compat.v1.train.summary_iterator(str(events))
        for value in event.summary.value
    }
    assert {"epoch_step_scale", "epoch_sequential/conv/omega_condition"} <= tags


def test_skipped_steps_are_counted_and_do_not_enter_the_means():
    model = compiled()
    images, labels = nets.image_batch(36)
    images[3] = np.nan
    history = model.fit(
        images, labels, batch_size=12, shuffle=False, verbose=0, callbacks=[CurvatureMonitor()]
    ).history
    assert history["skipped_steps"] == [1]
    assert np.isfinite(history["update_norm"][0])


@pytest.mark.slow
def test_a_monitor_may_come_late_and_go_again():
    """Its means are those of the epoch that it watches, in a step that was traced without it."""
    model = compiled()
    fit(model, epochs=1)
    for spectrum in ("condition", "none"):
        steps = Steps()
        history = fit(model, epochs=1, callbacks=[steps, CurvatureMonitor(spectrum)]).history
        lengths = np.linalg.norm(np.diff(steps.weights, axis=0), axis=1)
        assert history["update_norm"][0] == pytest.approx(lengths.mean(), rel=1e-3)
        fit(model, epochs=1)


@pytest.mark.nightly
def test_monitor_under_loss_scaling_and_accumulation():
    keras.config.set_dtype_policy("mixed_float16")
    model = compiled(KFC(gradient_accumulation_steps=3), steps_per_execution=2)
    history = fit(model, epochs=4, callbacks=[CurvatureMonitor()]).history
    assert np.isfinite(history["update_norm"][-1]) and history["update_norm"][-1] > 0


def test_other_optimizers_and_bad_arguments_are_refused(tmp_path):
    model = compiled("adam")
    for callback in (CurvatureMonitor(), keras_kfc.monitor.FactorPictures(tmp_path)):
        with pytest.raises(ValueError, match=r"compiled with `keras_kfc.KFC`.*Received"):
            fit(model, callbacks=[callback])
    with pytest.raises(ValueError, match=r"`spectrum` must be one of.*Received: spectrum='all'"):
        CurvatureMonitor("all")
    for every, error in ((0, ValueError), ("often", TypeError)):
        with pytest.raises(error, match="`every`"):
            keras_kfc.monitor.FactorPictures(tmp_path, every=every)


def test_without_blocks_no_step_is_shortened():
    model = nets.conv_net(keras.layers)
    model.compile(KFC(), LOSS)
    assert fit(model, callbacks=[CurvatureMonitor()]).history["step_scale"] == [1.0, 1.0]


def test_spectra_of_cut_factors_leave_out_the_rows_that_fill_them_up():
    """Seven outputs and seven inputs in parts of four: the last part has three rows."""
    keras.utils.set_random_seed(1)
    model = keras.Sequential([keras.Input((7,)), keras_kfc.layers.Dense(7, name="cut")])
    model.compile(
        KFC(max_factor_dim=4, fisher="exact", curvature_ema=0.0, weight_sharing="expand"), "mse"
    )
    x = np.random.default_rng(0).normal(size=(32, 7)).astype("float32")
    history = model.fit(
        x, x, batch_size=32, verbose=0, callbacks=[CurvatureMonitor("extremes")]
    ).history
    (block,) = model.optimizer.blocks
    # Squared error: gamma is a multiple of the identity.
    high, low = history["sequential/cut/gamma_max"][0], history["sequential/cut/gamma_min"][0]
    assert low == pytest.approx(high, rel=1e-4)
    assert history["sequential/cut/gamma_condition"][0] == pytest.approx(1, rel=1e-4)
    parts = [np.column_stack([x[:, :3], np.ones(32)]), x[:, 3:6], x[:, 6:]]
    assert block.layout.omega_row_mask.sum() == 8
    eigenvalues = np.concatenate([np.linalg.eigvalsh(part.T @ part / 32) for part in parts])
    assert history["sequential/cut/omega_min"][0] == pytest.approx(eigenvalues.min(), rel=1e-4)
    assert history["sequential/cut/omega_max"][0] == pytest.approx(eigenvalues.max(), rel=1e-4)


class Twins(keras.Model):
    """Two layers of one name."""

    def __init__(self):
        super().__init__()
        self.first = keras_kfc.layers.Dense(3, name="twin")
        self.second = keras_kfc.layers.Dense(3, name="twin")

    def call(self, inputs):
        return self.second(self.first(inputs))


@pytest.mark.nightly
def test_layers_of_one_path_have_numbers_of_their_own(tmp_path):
    model = Twins()
    model.compile(KFC(), "mse")
    x = np.ones((8, 3), "float32")
    history = model.fit(x, x, verbose=0, callbacks=[CurvatureMonitor()]).history
    assert sum(name.endswith("omega_condition") for name in history) == 2
    files = keras_kfc.monitor.draw_factors(model, tmp_path)
    assert len(set(files)) == 2 and all(file.is_file() for file in files)


@pytest.mark.nightly
def test_the_reduction_ratio_of_quadratic_steps_is_logged():
    """One where the model is exact: a linear net with the squared error."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((4,)), keras_kfc.layers.Dense(2)])
    model.compile(KFC(10.0, step="quadratic", seed=0, weight_decay=None), "mse")
    x = np.random.default_rng(0).normal(size=(64, 4))
    y = x[:, :2] + np.random.default_rng(1).normal(size=(64, 2))
    history = model.fit(x, y, batch_size=64, epochs=2, verbose=0, callbacks=[CurvatureMonitor()])
    # The model's damping makes it foretell a little less than there is.
    assert 1.0 <= history.history["reduction_ratio"][-1] < 1.6
    assert history.history["damping"][-1] < history.history["damping"][0] + 1e-6
    assert "reduction_ratio" not in fit(compiled(), callbacks=[CurvatureMonitor()]).history
