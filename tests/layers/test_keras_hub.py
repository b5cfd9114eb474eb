"""Backbones of keras_hub, built without a download: instrumented in place, they train."""

import keras
import numpy as np
import pytest
from helpers import few

import keras_kfc
from keras_kfc.layers.groups import parameter_groups

pytestmark = pytest.mark.slow
RNG = np.random.default_rng(0)


def models():
    import keras_hub  # takes seconds

    return keras_hub.models


def vit():
    backbone = models().ViTBackbone(
        image_shape=(32, 32, 3), patch_size=8, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32
    )
    inputs = keras.Input((32, 32, 3))
    return inputs, backbone(inputs)[:, 0], RNG.normal(size=(32, 32, 32, 3)).astype("float32")


def bert():
    backbone = models().BertBackbone(
        vocabulary_size=400,
        num_layers=2,
        num_heads=2,
        hidden_dim=16,
        intermediate_dim=32,
        max_sequence_length=12,
        dropout=0.0,
    )
    data = {
        "token_ids": RNG.integers(1, 50, (32, 12)),
        "segment_ids": np.zeros((32, 12), int),
        "padding_mask": np.arange(12) < RNG.integers(4, 13, (32, 1)),
    }
    return backbone.input, backbone(backbone.input)["pooled_output"], data


def resnet():
    backbone = models().ResNetBackbone(
        input_conv_filters=[64],
        input_conv_kernel_sizes=[3],
        stackwise_num_filters=[64, 128],
        stackwise_num_blocks=[1, 1],
        stackwise_num_strides=[1, 2],
        block_type="basic_block",
        image_shape=(32, 32, 3),
    )
    inputs = keras.Input((32, 32, 3))
    hidden = keras.layers.GlobalAveragePooling2D()(backbone(inputs))
    return inputs, hidden, RNG.normal(size=(32, 32, 32, 3)).astype("float32")


@pytest.mark.parametrize("build", few([bert, vit, resnet], 1))
def test_a_backbone_trains_with_blocks(build):
    keras.utils.set_random_seed(1)
    inputs, hidden, x = build()
    model = keras.Model(inputs, keras.layers.Dense(3, activation="softmax")(hidden))
    plain = model(x)
    keras_kfc.instrument(model)
    np.testing.assert_array_equal(model(x), plain)
    sizes = [int(np.prod(variable.shape)) for variable in model.trainable_variables]
    groups = parameter_groups(model.trainable_variables)
    covered = {index for group in groups for index in group.indices.every}
    # What is left is the tables of positions, which are layers of keras_hub's own.
    assert sum(sizes[index] for index in covered) > 0.98 * sum(sizes)
    model.compile(keras_kfc.KFC(seed=1), "sparse_categorical_crossentropy")
    losses = model.fit(x, RNG.integers(0, 3, 32), batch_size=16, epochs=10, verbose=0)
    assert losses.history["loss"][-1] < 0.7 * losses.history["loss"][0]
    outputs = model(x)
    np.testing.assert_array_equal(keras_kfc.strip(model)(x), outputs)
