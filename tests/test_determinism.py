"""Two runs under one seed are equal to the bit, in processes of their own."""

import numpy as np
import pytest
from helpers import run_python

# Trains with every source of random numbers, and writes weights and optimizer state.
SCRIPT = """
import sys
import keras
import numpy as np
import tensorflow as tf
import keras_kfc
import nets

keras.utils.set_random_seed(int(sys.argv[2]))
tf.config.experimental.enable_op_determinism()
stack = nets.conv_stack(seed=int(sys.argv[2]))
stack.insert(-1, keras.layers.Dropout(0.3))
model = keras.Sequential(stack)
model.compile(
    keras_kfc.KFC(factor_samples=7, inverse_update_period=3), "sparse_categorical_crossentropy"
)
images, labels = nets.image_batch(40)
model.fit(images, labels, batch_size=10, epochs=3, verbose=0)
state = [v.numpy() for v in model.variables + model.optimizer.variables]
np.savez(sys.argv[1], *state)
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")

    def run(name, seed):
        finished = run_python(SCRIPT, folder / f"{name}.npz", seed)
        assert finished.returncode == 0, finished.stderr
        with np.load(folder / f"{name}.npz") as state:
            return [state[key] for key in state.files]

    return run


def test_runs_are_equal_to_the_bit(run):
    first, second, other = run("first", 1), run("second", 1), run("other", 2)
    for one, two in zip(first, second, strict=True):
        np.testing.assert_array_equal(one, two)
    assert any((one != three).any() for one, three in zip(first, other, strict=True))
