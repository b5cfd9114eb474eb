"""What every layer kind does for its user: Keras's own outputs, saving, training."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import few
from keras import layers
from layer_cases import NO_MATRICES, build, every, firsts, one_of_each

import keras_kfc
from keras_kfc._compat.keras_internals import mask_of, set_mask


@every
def test_a_layer_is_keras_own_but_for_what_it_records(case):
    """The same outputs with a capture, to the precision of sums in another order; and without."""
    model, inputs = build(case)
    keras_kfc.strip(model)
    plain = model(inputs)
    keras_kfc.instrument(model)
    np.testing.assert_array_equal(model(inputs), plain)
    with keras_kfc.Capture() as capture:
        outputs = model(inputs)
    assert capture.records
    np.testing.assert_allclose(outputs, plain, rtol=1e-12, atol=1e-12)


@one_of_each
def test_a_layer_is_saved_and_loaded_as_it_is(case, tmp_path):
    model, inputs = build(case)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    kinds = [type(layer) for layer in model._flatten_layers()]
    assert [type(layer) for layer in loaded._flatten_layers()] == kinds
    np.testing.assert_array_equal(loaded(inputs), model(inputs))
    # And built from `keras_kfc.layers` without `instrument`.
    own = build(case, library=keras_kfc.layers, instrumented=False)[0]
    assert kinds == [type(layer) for layer in own._flatten_layers()]


@pytest.mark.slow
@pytest.mark.parametrize("case", few(firsts, 4), ids=str)
def test_a_layer_trains_and_resumes(case, tmp_path):
    """Blocks, factors and momenta are stored and go on as they were."""
    model, inputs = build(case, "float32")
    outputs = layers.Dense(2)(layers.Flatten()(model.outputs[0]))
    model = keras_kfc.instrument(keras.Model(model.inputs, outputs))
    targets = np.random.default_rng(1).normal(size=(len(inputs), 2)).astype("float32")
    model.compile(keras_kfc.KFC(seed=1), "mse")
    options = {"batch_size": 2, "shuffle": False, "verbose": 0}
    losses = model.fit(inputs, targets, epochs=8, **options).history["loss"]
    assert losses[-1] < 0.8 * losses[0]
    assert len(model.optimizer.blocks) > 1 and not model.optimizer.skipped_steps.numpy()
    assert not model.optimizer.rejected_inverse_updates.numpy()
    model.save(tmp_path / "model.keras")
    resumed = keras.models.load_model(tmp_path / "model.keras")
    for one in (model, resumed):
        one.fit(inputs, targets, epochs=10, initial_epoch=8, **options)
    for one, other in zip(model.get_weights(), resumed.get_weights(), strict=True):
        if "Transpose" in case.kind:
            # On a processor they add up in any order.
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)
        else:
            np.testing.assert_array_equal(one, other)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "case"), few(list(enumerate(firsts)), 2), ids=str)
def test_a_layer_trains_in_half_precision(number, case):
    """The policies take turns: what depends on them is the cast, which all kinds share."""
    policy = ("mixed_float16", "mixed_bfloat16")[number % 2]
    model, inputs = build(case, policy)
    outputs = layers.Dense(2, dtype="float32")(layers.Flatten()(model.outputs[0]))
    model = keras_kfc.instrument(keras.Model(model.inputs, outputs))
    targets = np.random.default_rng(1).normal(size=(len(inputs), 2)).astype("float32")
    model.compile(keras_kfc.KFC(seed=1), "mse")
    losses = model.fit(inputs, targets, epochs=8, batch_size=2, verbose=0).history["loss"]
    assert np.isfinite(losses).all() and losses[-1] < losses[0]


@one_of_each
def test_a_mask_that_keras_hands_on_counts(case):
    """Unless the weights have numbers for the steps that it leaves out."""
    if case.kind in NO_MATRICES or "Embedding" in case.kind:
        return
    model, inputs = build(case)
    layer = model.layers[-1]
    if len(inputs.shape) < 3:
        return
    tensor = tf.constant(inputs)
    mask = tf.constant(np.arange(inputs.shape[1]) < 2)[None] & tf.ones((4, 1), tf.bool)
    set_mask(tensor, mask)
    with keras_kfc.Capture() as capture:
        kept = mask_of(layer(tensor)) is not None
    for record in capture.records.values():
        keeps = record.linear_map.keeps_positions
        assert keeps or not kept or case.kind == "PReLU"
        assert kept or not keeps or case.kind in ("EinsumDense", "RMSNormalization")
        assert all((use.mask is mask) == keeps for use in record.uses)
