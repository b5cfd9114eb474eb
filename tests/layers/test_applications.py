"""Networks of keras.applications."""

import keras
import numpy as np
import pytest
from helpers import few

import keras_kfc


@pytest.mark.slow
@pytest.mark.parametrize("application", few(["MobileNetV2", "ResNet50V2", "DenseNet121"], 1))
def test_keras_applications_are_covered_and_serve_the_same(application):
    build = getattr(keras.applications, application)
    model = build(weights=None, input_shape=(32, 32, 3), classes=4)
    images = np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype("float32")
    before = model(images).numpy()
    keras_kfc.instrument(model)
    expected = [
        layer.path
        for layer in model._flatten_layers(include_self=False)
        if layer._trainable_variables
    ]
    coverage = keras_kfc.coverage(model)
    assert coverage.covered == expected and len(expected) > 60 and not coverage.fallback
    np.testing.assert_array_equal(model(images).numpy(), before)


@pytest.mark.nightly
def test_an_application_trains():
    keras.utils.set_random_seed(3)
    model = keras.applications.MobileNet(
        weights=None, input_shape=(32, 32, 3), classes=3, alpha=0.25
    )
    keras_kfc.instrument(model)
    model.compile(keras_kfc.KFC(seed=1), "sparse_categorical_crossentropy")
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 48)
    images = (rng.normal(size=(48, 32, 32, 3)) + labels[:, None, None, None]).astype("float32")
    history = model.fit(images, labels, batch_size=16, epochs=6, shuffle=False, verbose=0)
    losses = history.history["loss"]
    assert np.isfinite(losses).all() and losses[-1] < 0.7 * losses[0]
    assert int(model.optimizer.skipped_steps) == 0
