"""Models with capturing layers come back from clones and configurations."""

import keras
import nets
import numpy as np
import pytest
from resuming import compiled, default_optimizer, fit

import keras_kfc


@pytest.mark.slow
def test_clones_are_instrumented_and_independent():
    model = compiled()
    fit(model, 1)
    clone = keras.models.clone_model(model)
    assert keras_kfc.coverage(clone).covered == keras_kfc.coverage(model).covered
    assert not set(map(id, clone.variables)) & set(map(id, model.variables))
    clone.set_weights(model.get_weights())
    before = nets.flat_weights(model)
    clone.compile(optimizer=default_optimizer(), loss="sparse_categorical_crossentropy")
    fit(clone, 1)
    np.testing.assert_array_equal(nets.flat_weights(model), before)
    assert len(clone.optimizer.blocks) == 2
    nested = keras.models.clone_model(keras.Sequential([keras.Input((8, 8, 2)), model]))
    assert len(keras_kfc.coverage(nested).covered) == 2


@pytest.mark.parametrize(
    "serialise",
    [
        lambda model: type(model).from_config(model.get_config()),
        lambda model: keras.models.model_from_json(model.to_json()),
    ],
)
def test_models_come_back_from_their_configuration(serialise):
    model = serialise(compiled())
    assert [path.split("/")[-1] for path in keras_kfc.coverage(model).covered] == ["conv", "dense"]
