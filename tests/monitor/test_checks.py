"""The monitor warns of what looks wrong, and of nothing else."""

import keras
import nets
import numpy as np
import pytest
import tensorflow as tf

import keras_kfc
from keras_kfc import KFC
from keras_kfc.monitor import CurvatureMonitor
from keras_kfc.monitor.checks import RunChecks

LOSS = "sparse_categorical_crossentropy"


def lines_of(caplog):
    """What the monitor has said."""
    return [r.getMessage() for r in caplog.records if r.module == "checks"]


schedules = keras.optimizers.schedules


def fit(optimizer, caplog, epochs=2, images=None):
    """Warnings of a training of three steps an epoch, and its history."""
    model = nets.conv_net()
    model.compile(optimizer, LOSS)
    batch, labels = nets.image_batch(36)
    with caplog.at_level("WARNING", logger="keras_kfc"):
        history = model.fit(
            batch if images is None else images,
            labels,
            batch_size=12,
            epochs=epochs,
            shuffle=False,
            verbose=0,
            callbacks=[CurvatureMonitor()],
        ).history
    return lines_of(caplog), history


@pytest.mark.slow
def test_ages_are_those_of_the_schedule_of_updates(caplog):
    """Due in each of the first 8 steps, in every second of the next 8, in every fourth then."""
    lines, history = fit(KFC(seed=3), caplog, epochs=9)
    assert not lines
    for name in ("factor_age", "inverse_age"):
        assert history[name] == [1, 1, 1, 2, 1, 2, 1, 4, 3]


def test_coverage_is_the_part_with_a_block(caplog):
    model = keras.Sequential(
        [keras.Input((3,)), keras_kfc.layers.Dense(5), keras.layers.Dense(2, name="plain")]
    )
    model.compile(KFC(), "mse")
    history = model.fit(
        np.ones((4, 3)), np.ones((4, 2)), verbose=0, callbacks=[CurvatureMonitor()]
    ).history
    assert history["coverage"] == [pytest.approx(20 / 32)]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"learning_rate": schedules.CosineDecay(0.03, 10**6)}, "`learning_rate` changes by less"),
        ({"damping": schedules.ExponentialDecay(0.2, 10**6, 0.5)}, "`damping` changes by less"),
        (
            {"polyak_scaling": schedules.PiecewiseConstantDecay([10], [1.0, 0.1])},
            "`polyak_scaling` changes by less",
        ),
        ({"learning_rate": schedules.CosineDecay(0.03, 2)}, "at an end before half of the 6"),
        ({"learning_rate": schedules.CosineDecay(0.03, 6)}, None),
        ({"damping": schedules.ExponentialDecay(0.2, 6, 0.5)}, None),
        (
            {"learning_rate": schedules.CosineDecay(0.0, 4, warmup_target=0.03, warmup_steps=2)},
            None,
        ),
    ],
)
def test_schedules_that_do_nothing(arguments, says, caplog):
    with caplog.at_level("WARNING", logger="keras_kfc"):
        RunChecks(KFC(**arguments)).check_schedules(6)
    lines = lines_of(caplog)
    assert len(lines) == (says is not None)
    assert says is None or says in lines[0]


@pytest.mark.slow
def test_schedules_are_looked_at_when_training_begins(caplog):
    """And go by the optimizer's own steps, of two batches each."""
    schedule = schedules.PiecewiseConstantDecay([4], [0.03, 0.01])
    optimizer = KFC(schedule, seed=3, gradient_accumulation_steps=2)
    assert "changes by less" in fit(optimizer, caplog)[0][0]


@pytest.mark.slow
def test_a_training_that_goes_on_has_the_rest_of_its_schedule(caplog):
    """From `initial_epoch`; counted from epoch 0, the schedule would end in half of the steps."""
    model = nets.conv_net()
    model.compile(KFC(schedules.CosineDecay(0.03, 12), seed=3), LOSS)
    x, y = nets.image_batch(36)
    options = {"batch_size": 12, "verbose": 0}
    model.fit(x, y, epochs=2, **options)
    with caplog.at_level("WARNING", logger="keras_kfc"):
        model.fit(x, y, epochs=4, initial_epoch=2, callbacks=[CurvatureMonitor()], **options)
        assert not lines_of(caplog)
        # Steps that the schedule is not made for.
        model.fit(x, y, epochs=4, callbacks=[CurvatureMonitor()], **options)
    assert len(lines_of(caplog)) == 1


def test_many_skipped_steps(caplog):
    images, _ = nets.image_batch(36)
    images[3] = np.nan
    lines, _ = fit(KFC(seed=3), caplog, epochs=3, images=images)
    assert len(lines) == 1 and "left out 1 of the 3 steps" in lines[0]


@pytest.mark.slow
@pytest.mark.parametrize("rate", [1e-5, 0.03])
def test_a_learning_rate_that_was_meant_for_adam(rate, caplog):
    """The loss falls so slowly that all steps are as long as allowed; not at the default."""
    model = nets.conv_net()
    model.compile(KFC(rate, seed=3), LOSS)
    images, labels = nets.image_batch(36)
    data = tf.data.Dataset.from_tensor_slices((images, labels)).repeat().batch(12)
    with caplog.at_level("WARNING", logger="keras_kfc"):
        model.fit(data, steps_per_epoch=70, epochs=4, verbose=0, callbacks=[CurvatureMonitor()])
    lines = lines_of(caplog)
    assert len(lines) == (rate != 0.03)
    assert rate == 0.03 or "as long as `learning_rate=1e-05` allows" in lines[0]


def test_inverses_that_are_never_finite_get_old(caplog):
    """As with a schedule of damping that computes a NaN; as old as the first try."""
    model = keras.Sequential([keras.Input((2,)), keras_kfc.layers.Dense(2)])
    damping = schedules.PiecewiseConstantDecay([9], [0.1, float("nan")])  # NaN in each step
    optimizer = KFC(damping=damping, curvature_update_period=2, inverse_update_period=2)
    model.compile(optimizer, "mse")
    x = np.random.default_rng(0).normal(size=(32, 2)).astype("float32")
    with caplog.at_level("WARNING", logger="keras_kfc"):
        history = model.fit(
            x, x, batch_size=2, epochs=2, verbose=0, callbacks=[CurvatureMonitor()]
        ).history
    assert optimizer.rejected_inverse_updates.numpy() > 10
    assert history["inverse_age"] == [16, 32] and max(history["factor_age"]) <= 2
    lines = lines_of(caplog)
    assert len(lines) == 1 and "The inverses of some layers are 16 steps old" in lines[0]


def steep(y_true, y_pred):
    """Bends far more than its second derivative at zero says."""
    return tf.square(y_pred - 1.0) + 1e4 * y_pred**4 + 0 * y_true


@pytest.mark.slow
@pytest.mark.parametrize(("loss", "taken_back"), [(steep, 1.0), ("mse", 0.0)])
def test_steps_that_are_taken_back_often(loss, taken_back, caplog):
    """The first step from zero makes the steep loss worse, and a parabola's smaller."""
    model = keras.Sequential([keras.Input((1,))])
    model.add(keras_kfc.layers.Dense(1, use_bias=False, kernel_initializer="zeros"))
    settings = {"step": "quadratic", "fisher": "exact", "weight_decay": None, "seed": 0}
    model.compile(KFC(10.0, **settings), loss)
    x = np.ones((4, 1))
    with caplog.at_level("WARNING", logger="keras_kfc"):
        history = model.fit(x, x, verbose=0, callbacks=[CurvatureMonitor()]).history
    assert history["steps_taken_back"] == [taken_back]
    assert sum("took back 100%" in line for line in lines_of(caplog)) == taken_back


@pytest.mark.nightly
@pytest.mark.parametrize(("blocks", "numbers"), [(4, 8), (5, 0)])
def test_auto_is_quiet_on_deep_nets(blocks, numbers):
    model = keras.Sequential([keras.Input((2,))])
    for _ in range(blocks):
        model.add(keras_kfc.layers.Dense(2))
    model.compile(KFC(), "mse")
    x = np.ones((4, 2))
    history = model.fit(x, x, verbose=0, callbacks=[CurvatureMonitor("auto")]).history
    assert sum(name.endswith("condition") for name in history) == numbers
