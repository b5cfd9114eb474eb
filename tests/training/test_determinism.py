"""Two runs under one seed are equal to the bit, in processes of their own."""

import numpy as np
import pytest
from helpers import run_python

pytestmark = pytest.mark.slow

# Trains with every source of random numbers, and writes weights and optimizer state.
SCRIPT = """
import sys
import keras
import numpy as np
import tensorflow as tf
import keras_kfc
import nets

tf.config.experimental.enable_op_determinism()
for seed in map(int, sys.argv[2:]):
    keras.utils.set_random_seed(seed)
    stack = nets.conv_stack(seed=seed)
    stack.insert(-1, keras.layers.Dropout(0.3))
    model = keras.Sequential(stack)
    model.compile(
        keras_kfc.KFC(factor_batch_size=7, inverse_update_period=3),
        "sparse_categorical_crossentropy",
    )
    images, labels = nets.image_batch(40)
    model.fit(images, labels, batch_size=10, epochs=3, verbose=0)
    state = [v.numpy() for v in model.variables + model.optimizer.variables]
    np.savez(f"{sys.argv[1]}/{seed}.npz", *state)
"""


@pytest.mark.nightly
def test_runs_are_equal_to_the_bit(tmp_path):
    states = {}
    for run, seeds in (("first", (1, 2)), ("second", (1,))):
        (tmp_path / run).mkdir()
        finished = run_python(SCRIPT, tmp_path / run, *seeds)
        assert finished.returncode == 0, finished.stderr
        for seed in seeds:
            with np.load(tmp_path / run / f"{seed}.npz") as state:
                states[run, seed] = [state[key] for key in state.files]
    for one, two in zip(states["first", 1], states["second", 1], strict=True):
        np.testing.assert_array_equal(one, two)
    pairs = zip(states["first", 1], states["first", 2], strict=True)
    assert any((one != two).any() for one, two in pairs)
