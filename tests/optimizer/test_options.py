"""What Keras's optimizers can do, KFC can: "with equals without", or equals the definition."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import few
from option_runs import (
    LOSS,
    assert_equal_weights,
    assert_other_weights,
    batches,
    by_hand,
    fitted,
    kfc,
    net,
)

import keras_kfc


@pytest.fixture(scope="module")
def reference():
    return fitted()


def test_the_loop_by_hand_is_what_fit_does(reference):
    assert_equal_weights(by_hand(kfc()), reference)


CLIPPINGS = {
    "clipnorm": lambda gradients, _: [tf.clip_by_norm(g, 0.05) for g in gradients],
    "clipvalue": lambda gradients, _: [tf.clip_by_value(g, -0.05, 0.05) for g in gradients],
    "global_clipnorm": lambda gradients, _: tf.clip_by_global_norm(gradients, 0.05)[0],
}


@pytest.mark.parametrize("name", few(CLIPPINGS, 1))
def test_gradients_are_clipped_before_they_are_preconditioned(name, reference):
    clipped = fitted(kfc(polyak_scaling=None, weight_decay=None, **{name: 0.05}))
    assert_equal_weights(
        clipped, by_hand(kfc(polyak_scaling=None, weight_decay=None), CLIPPINGS[name])
    )
    assert_other_weights(clipped, reference)


@pytest.mark.slow
def test_a_clipped_gradient_makes_a_step_shorter():
    """Polyak's rule by itself would make it longer: a smaller gradient promises less."""
    options = {"momentum": 0.0, "polyak_scaling": 0.01, "adam_lr_ratio": 0.0, "weight_decay": None}
    model = net()
    start = model.get_weights()
    x, y = batches()
    with tf.GradientTape() as tape:
        loss = tf.reduce_mean(keras.losses.get(LOSS)(y, model(x)))
    gradients = tape.gradient(loss, model.trainable_variables)
    bound = 0.25 * float(tf.linalg.global_norm(gradients))
    free = fitted(kfc(**options), size=64).get_weights()
    clipped = fitted(kfc(global_clipnorm=bound, **options), size=64).get_weights()
    for before, far, near in zip(start, free, clipped, strict=True):
        np.testing.assert_allclose(near - before, 0.25 * (far - before), rtol=1e-3, atol=1e-6)
    assert np.abs(free[0] - start[0]).max() > 1e-3


def test_a_wide_clip_changes_nothing(reference):
    assert_equal_weights(fitted(kfc(global_clipnorm=1e6)), reference)


def own_loss(y_true, y_pred):
    """Whose lowest value nobody knows, so that all of the gradient counts as noise."""
    return keras.losses.sparse_categorical_crossentropy(y_true, y_pred)


def test_weight_decay_is_decoupled_and_leaves_out_biases_and_what_is_excluded():
    """In the first step, decay is the only difference. `test_step` has it with known noise."""

    def after_one_step(decay):
        keras.utils.set_random_seed(4)
        model = keras.Sequential(
            [
                keras.Input((6,)),
                keras_kfc.layers.Dense(5, activation="tanh", name="hidden"),
                keras.layers.LayerNormalization(name="norm"),
                keras.layers.EinsumDense("bi,io->bo", 5, name="other"),
                keras_kfc.layers.Dense(3, activation="softmax", name="head"),
            ]
        )
        optimizer = kfc(weight_decay=decay, polyak_scaling=None, fisher="empirical", momentum=0.6)
        optimizer.exclude_from_weight_decay(var_names=["head"])
        model.compile(optimizer, own_loss)
        start = model.get_weights()
        x, y = batches()
        model.train_on_batch(x, y)
        paths = [variable.path for variable in model.trainable_variables]
        return paths, start, model.get_weights()

    _, _, plain = after_one_step(None)
    paths, start, decayed = after_one_step(0.5)
    for name, before, free, after in zip(paths, start, plain, decayed, strict=True):
        # The lowest value of such a loss is not known.
        rate = 0.2 * 0.2 * 0.03 * name.endswith(("hidden/kernel", "other/kernel"))
        np.testing.assert_allclose(after - free, -0.5 * rate * before, atol=1e-6, err_msg=name)


@pytest.mark.nightly
def test_exclusion_by_variable_list():
    model = net()
    optimizer = kfc(weight_decay=0.5)
    optimizer.exclude_from_weight_decay(var_list=model.trainable_variables)
    free = fitted(kfc(weight_decay=None))
    assert_equal_weights(fitted(optimizer, model), free)
    # A decay that nothing is excluded from shows.
    assert_other_weights(fitted(kfc(weight_decay=0.5)), free)


def test_regularisers_add_to_the_gradient_and_not_to_the_factors(reference):
    regularised = fitted(model=net(kernel_regularizer=keras.regularizers.L2(0.1)))

    def penalty(model):
        return 0.1 * tf.reduce_sum(tf.square(model.get_layer("hidden").kernel))

    assert_equal_weights(regularised, by_hand(kfc(), penalty=penalty))
    assert_other_weights(regularised, reference)


@pytest.mark.nightly
def test_constraints_are_applied_after_each_step(reference):
    constrained = fitted(model=net(kernel_constraint=keras.constraints.MaxNorm(0.5)))
    norms = np.linalg.norm(constrained.get_layer("hidden").get_weights()[0], axis=0)
    assert norms.max() < 0.5 + 1e-5
    assert_other_weights(constrained, reference)
    wide = fitted(model=net(kernel_constraint=keras.constraints.MaxNorm(100.0)))
    assert_equal_weights(wide, reference)


@pytest.mark.parametrize(
    "options",
    few(
        [
            {"steps_per_execution": 3},
            {"run_eagerly": True},
            {"jit_compile": False},
            {"jit_compile": "auto"},
        ],
        2,
    ),
    ids=lambda options: "-".join(map(str, *options.items())),
)
def test_ways_to_run_a_step_make_no_difference(options, reference):
    assert_equal_weights(fitted(**options), reference)


@pytest.mark.nightly
def test_xla_makes_no_difference_but_for_its_draws():
    exact = fitted(kfc(fisher="exact"))
    assert_equal_weights(fitted(kfc(fisher="exact"), jit_compile=True), exact, rtol=1e-3)


@pytest.mark.nightly
def test_options_together():
    """Accumulation, clipping, decay, average and XLA in one program, against eager mode."""
    optimizer = {
        "gradient_accumulation_steps": 2,
        "global_clipnorm": 0.3,
        "weight_decay": 0.01,
        "use_ema": True,
        "fisher": "exact",
    }
    options = {"jit_compile": True, "steps_per_execution": 2}
    eager = fitted(kfc(**optimizer), run_eagerly=True)
    assert_equal_weights(fitted(kfc(**optimizer), **options), eager, rtol=1e-3)


@pytest.mark.nightly
def test_schedules_follow_the_iterations(reference):
    constant = keras.optimizers.schedules.PiecewiseConstantDecay
    rates = constant([2], [0.03, 0.03])
    same = kfc(learning_rate=rates, polyak_scaling=1.0, damping=constant([2], [0.15, 0.15]))
    assert_equal_weights(fitted(same), reference)
    stopped = kfc(learning_rate=constant([1], [0.03, 0.0]), polyak_scaling=1.0, momentum=0.0)
    one_step = net()
    one_step.compile(kfc(momentum=0.0), LOSS)
    x, y = batches()
    one_step.fit(x[:32], y[:32], batch_size=16, shuffle=False, verbose=0)
    assert_equal_weights(fitted(stopped), one_step)
    same = kfc(polyak_scaling=constant([2], [1.0, 1.0]))
    assert_equal_weights(fitted(same), reference)
    stopped = fitted(kfc(polyak_scaling=constant([1], [1.0, 0.0]), momentum=0.0))
    # The normalisation goes on, by the fallback rule.
    assert_equal_weights(stopped.get_layer("hidden"), one_step.get_layer("hidden"))
    assert_equal_weights(stopped.get_layer("head"), one_step.get_layer("head"))
    damped = kfc(damping=constant([0], [0.15, 5.0]))
    assert_other_weights(fitted(damped), reference)
