"""Nothing outlives its model: captures, layers, optimizers."""

import gc
import weakref

import keras
import nets
import numpy as np
import pytest
import tensorflow as tf
from helpers import few

import keras_kfc
from keras_kfc.passes.capture import Capture

pytestmark = pytest.mark.slow

LOSS = "sparse_categorical_crossentropy"


def live_captures():
    gc.collect()
    return sum(isinstance(thing, Capture) for thing in gc.get_objects())


def compiled(**kwargs):
    model = nets.conv_net(batch_norm=False)
    model.compile(keras_kfc.KFC(), LOSS, **kwargs)
    return model


@pytest.mark.nightly
def test_eager_steps_leave_no_captures():
    model, before = compiled(run_eagerly=True), live_captures()
    for _ in range(4):
        model.train_on_batch(*nets.image_batch())
    assert live_captures() <= before


@pytest.mark.nightly
def test_eager_loops_with_captures_of_their_own_leave_none():
    model, before = compiled(), live_captures()
    images, labels = nets.image_batch()
    model.optimizer.build(model.trainable_variables)
    for _ in range(3):
        with tf.GradientTape() as tape:
            with keras_kfc.Capture() as capture:
                outputs = model(images, training=True)
            losses = keras.losses.sparse_categorical_crossentropy(labels, outputs)
            loss = tf.reduce_mean(losses)
        gradients = tape.gradient(loss, model.trainable_variables)
        model.optimizer.update_factors(capture, LOSS, labels, outputs)
        model.optimizer.apply(gradients, model.trainable_variables)
        del capture, tape
    assert live_captures() <= before


def train(model):
    model.train_on_batch(*nets.image_batch())


def leave_a_pass_unfinished(model):
    """A forward pass in training mode that no step follows."""
    train(model)
    with tf.GradientTape() as tape:
        model(nets.image_batch()[0], training=True)
    del tape


@pytest.mark.parametrize("use", few([leave_a_pass_unfinished, train], 1))
@pytest.mark.parametrize("run_eagerly", few([False, True], 1))
def test_models_are_freed_with_their_optimizers(use, run_eagerly):
    model = compiled(run_eagerly=run_eagerly)
    use(model)
    references = [weakref.ref(thing) for thing in (model, model.optimizer, model.layers[0])]
    del model
    keras.backend.clear_session()
    gc.collect()
    assert [reference() for reference in references] == [None, None, None]


def test_an_unfinished_pass_does_not_reach_the_next_step():
    expected, model = compiled(), compiled()
    model.set_weights(expected.get_weights())
    leave_a_pass_unfinished(expected)
    train(model)
    train(model)
    train(expected)
    np.testing.assert_allclose(nets.flat_weights(expected), nets.flat_weights(model), rtol=1e-5)
