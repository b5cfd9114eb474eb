"""Pictures of factors exist, show what they should, and need nothing but matplotlib."""

import keras
import nets
import numpy as np
import pytest
from helpers import run_python
from matplotlib import image

import keras_kfc
from keras_kfc.monitor.pictures import _block_diagonal, _that_fit, draw_factors

pytestmark = pytest.mark.slow


def trained(**kwargs):
    model = nets.conv_net()
    nets.train(model, keras_kfc.KFC(**kwargs), steps=2)
    return model


def assert_is_a_picture(file):
    pixels = image.imread(file)
    height, width, _ = pixels.shape
    assert width > 1000 and height > 300
    # Each of the three panels holds more than its frame.
    for panel in np.array_split(pixels, 3, axis=1):
        assert len(np.unique(panel.reshape(-1, panel.shape[-1]), axis=0)) > 20


@pytest.mark.nightly
def test_a_trained_model_is_drawn_layer_by_layer(tmp_path):
    model = trained()
    files = draw_factors(model, tmp_path / "new" / "folder")
    assert [file.name for file in files] == ["sequential_conv.png", "sequential_dense.png"]
    for file in files:
        assert_is_a_picture(file)
    assert draw_factors(model.optimizer, tmp_path) != []


@pytest.mark.nightly
def test_factors_of_data_and_of_groups_are_drawn(tmp_path):
    model = keras.Sequential(
        [
            keras.Input((6, 6, 4)),
            keras.layers.Conv2D(4, 3, groups=2, name="grouped"),
            keras.layers.Flatten(),
            keras.layers.Dense(3, name="head"),
        ]
    )
    x = np.random.default_rng(0).normal(size=(8, 6, 6, 4)).astype("float32")
    for file in draw_factors(keras_kfc.kronecker_factors(model, x, loss="mse"), tmp_path):
        assert_is_a_picture(file)


def test_layers_without_data_are_left_out(tmp_path):
    model = nets.conv_net()
    optimizer = keras_kfc.KFC()
    optimizer.build(model.trainable_variables)
    assert draw_factors(optimizer, tmp_path) == []


def test_dead_factors_can_be_drawn(tmp_path):
    zeros = keras_kfc.KroneckerFactors(np.zeros((3, 3)), np.zeros((2, 2)))
    (file,) = draw_factors({"dead": zeros}, tmp_path)
    assert file.stat().st_size > 1000


def test_blocks_stand_on_the_diagonal():
    blocks = np.arange(8.0).reshape(2, 2, 2)
    nothing = np.full((2, 2), np.nan)
    expected = np.block([[blocks[0], nothing], [nothing, blocks[1]]])
    np.testing.assert_array_equal(_block_diagonal(list(blocks)), expected)


def test_only_the_first_of_very_many_rows_are_shown():
    assert len(_that_fit([np.zeros((2000, 1))] * 13)) == 2
    assert len(_that_fit([np.zeros((9000, 1))])) == 1


@pytest.mark.nightly
def test_the_callback_draws_every_so_many_epochs(tmp_path):
    model = nets.conv_net()
    model.compile(keras_kfc.KFC(), "sparse_categorical_crossentropy")
    callback = keras_kfc.monitor.FactorPictures(tmp_path, every=2)
    model.fit(*nets.image_batch(), epochs=5, verbose=0, callbacks=[callback])
    found = sorted(str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*.png"))
    assert found == [
        f"epoch_{epoch}/sequential_{layer}.png"
        for epoch in ("002", "004")
        for layer in ("conv", "dense")
    ]


def test_other_sources_are_refused(tmp_path):
    model = nets.conv_net()
    model.compile("adam", "mse")
    for source in (model, "factors", {"a": 1}, None):
        with pytest.raises(TypeError, match=r"`source` must be.*Received: source="):
            draw_factors(source, tmp_path)


def test_without_matplotlib_everything_else_works():
    program = """
import sys
sys.modules["matplotlib"] = None
import keras_kfc
try:
    keras_kfc.monitor.FactorPictures("anywhere")
except ImportError as error:
    print(error)
"""
    result = run_python(program)
    assert result.returncode == 0, result.stderr
    assert "pip install keras-kfc[pictures]" in result.stdout
