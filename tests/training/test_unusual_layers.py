"""Layers that are shared, frozen, tied, never called or out of reach."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from nets import compiled, conv_net, flat_weights, image_batch

import keras_kfc
from conftest import relative_error


def test_shared_layer_trains_with_both_uses():
    keras.utils.set_random_seed(1)
    shared = keras_kfc.layers.Dense(2, use_bias=False)
    left, right = keras.Input((3,)), keras.Input((3,))
    model = compiled(
        keras.Model([left, right], shared(left) - 2 * shared(right)),
        "mse",
        fisher="exact",
        weight_sharing="expand",
    )
    x = [np.random.default_rng(i).normal(size=(16, 3)) for i in range(2)]
    model.train_on_batch(x, np.ones((16, 2)))
    (block,) = model.optimizer.blocks
    assert relative_error(block.omega[0], sum(part.T @ part for part in x) / 16) < 1e-5
    assert relative_error(block.gamma[0], np.eye(2) * 5 / 2) < 1e-5


class Tied(keras_kfc.layers.Dense):
    """Uses the kernel of another layer."""

    def __init__(self, source):
        super().__init__(source.units, use_bias=False)
        self.source = source

    def build(self, input_shape):
        """Takes over the other layer's kernel."""
        self._kernel, self.bias = self.source._kernel, None
        self.built = True


def test_layers_with_one_kernel_variable_share_a_block():
    first = keras_kfc.layers.Dense(3, use_bias=False)
    model = compiled(
        keras.Sequential([keras.Input((3,)), first, Tied(first)]),
        "mse",
        fisher="exact",
        weight_sharing="expand",
    )
    first.set_weights([2 * np.eye(3)])
    x = np.random.default_rng(0).normal(size=(16, 3))
    model.train_on_batch(x, x)
    (block,) = model.optimizer.blocks
    # Uses see x and 2 x; their derivatives are 2 R and R with R Rᵀ = 2/3 I.
    assert relative_error(block.omega[0], 5 * x.T @ x / 16) < 1e-5
    assert relative_error(block.gamma[0], (4 + 1) * 2 / 3 / 2 * np.eye(3)) < 1e-5


@pytest.mark.nightly
def test_frozen_layers_have_no_block_and_keep_their_weights():
    model = conv_net(batch_norm=False)
    model.get_layer("conv").trainable = False
    frozen = model.get_layer("conv").get_weights()
    compiled(model)
    model.train_on_batch(*image_batch())
    assert [block.path.split("/")[-1] for block in model.optimizer.blocks] == ["dense"]
    for old, new in zip(frozen, model.get_layer("conv").get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)
    model.get_layer("conv").trainable = True
    compiled(model)
    model.train_on_batch(*image_batch())
    assert len(model.optimizer.blocks) == 2
    assert relative_error(model.get_layer("conv").get_weights()[0], frozen[0]) > 0


@pytest.mark.slow
def test_frozen_bias_leaves_the_kernel_a_block_of_its_own():
    model = conv_net(batch_norm=False)
    model.get_layer("dense").bias.trainable = False
    compiled(model).train_on_batch(*image_batch())
    sizes = {b.path.split("/")[-1]: b.omega.shape[-1] for b in model.optimizer.blocks}
    assert sizes == {"conv": 19, "dense": 64}
    np.testing.assert_array_equal(model.get_layer("dense").bias.numpy(), 0)


class WithSpare(keras.Model):
    """Has a layer that it never calls."""

    def __init__(self):
        super().__init__()
        self.used, self.spare = keras_kfc.layers.Dense(2), keras_kfc.layers.Dense(2)
        self.spare.build((None, 3))

    def call(self, inputs):
        """Calls one of the two layers."""
        return self.used(inputs)


@pytest.mark.nightly
@pytest.mark.filterwarnings("ignore:Gradients do not exist")
def test_layer_that_is_never_called():
    model = compiled(WithSpare(), "mse")
    before = model.spare.get_weights()
    for _ in range(2):
        model.train_on_batch(np.ones((4, 3)), np.ones((4, 2)))
    np.testing.assert_array_equal(model.spare.get_weights()[0], before[0])
    assert np.isfinite(flat_weights(model)).all()


@pytest.mark.nightly
def test_second_compile_starts_afresh():
    model = compiled()
    model.train_on_batch(*image_batch())
    compiled(model)
    assert not any(float(block.ema_weight) for block in model.optimizer.blocks)
    model.train_on_batch(*image_batch())
    assert len(model.optimizer.blocks) == 2
    model.compile(optimizer="adam", loss="sparse_categorical_crossentropy")
    model.train_on_batch(*image_batch())
    assert np.isfinite(flat_weights(model)).all()


def test_layers_out_of_reach_say_what_to_do():
    class Looping(keras.Model):
        def __init__(self):
            super().__init__()
            self.inner = keras_kfc.layers.Dense(2, name="inner")

        def call(self, inputs):
            return tf.function(self.inner)(inputs)

    with pytest.raises(ValueError, match=r"inner runs inside a loop.*exclude"):
        compiled(Looping(), "mse").train_on_batch(np.ones((4, 3)), np.ones((4, 2)))


@pytest.mark.slow
def test_embedding_and_other_layers_train_by_the_fallback_rule():
    keras.utils.set_random_seed(1)
    model = keras.Sequential(
        [
            keras.Input((5,), dtype="int32"),
            keras.layers.Embedding(7, 4),
            keras.layers.Conv1D(4, 3, activation="relu"),
            keras.layers.GlobalAveragePooling1D(),
            keras_kfc.layers.Dense(1),
        ]
    )
    compiled(model, "mse")
    tokens = np.random.default_rng(0).integers(0, 7, size=(64, 5))
    before = [w.copy() for w in model.get_weights()]
    history = model.fit(tokens, (tokens[:, 2:3] > 3).astype("float32"), epochs=60, verbose=0)
    assert history.history["loss"][-1] < 0.5 * history.history["loss"][0]
    for old, new in zip(before, model.get_weights(), strict=True):
        assert relative_error(new, old) > 0
