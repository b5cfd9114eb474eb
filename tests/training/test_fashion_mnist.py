"""KFC at its defaults against tuned SGD on real images, where the files are.

`.ci/run` installs them (Debian's package dataset-fashion-mnist). Elsewhere set
KERAS_KFC_FASHION_MNIST to a folder that holds the four IDX files.
"""

import os
import pathlib

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_kfc
from examples.data import load_fashion_mnist
from examples.nets import fashion_net

pytestmark = pytest.mark.slow

FOLDER = pathlib.Path(
    os.environ.get("KERAS_KFC_FASHION_MNIST", "/usr/share/datasets/fashion-mnist")
)
TARGET = 0.4
SGD_RATES = (0.005, 0.01, 0.02)


def losses_of(optimizer, images, labels, iterations, every):
    """Training losses every few iterations, from the same weights and batches every time."""
    model = fashion_net()
    if isinstance(optimizer, keras_kfc.KFC):
        keras_kfc.instrument(model)
    model.compile(optimizer, "sparse_categorical_crossentropy")
    batches = tf.data.Dataset.from_tensor_slices((images, labels))
    batches = iter(batches.shuffle(len(images), seed=1).repeat().batch(64))
    losses = []
    for iteration in range(1, iterations + 1):
        model.train_on_batch(*next(batches))
        if iteration % every == 0:
            losses.append(model.evaluate(images[:2000], labels[:2000], 500, verbose=0))
            if losses[-1] <= TARGET:
                break
    return losses


@pytest.mark.nightly
@pytest.mark.skipif(
    not FOLDER.is_dir(),
    reason=f"Fashion-MNIST is not at {FOLDER}: install Debian's package dataset-fashion-mnist "
    "or set KERAS_KFC_FASHION_MNIST",
)
def test_a_fifth_of_the_iterations_of_tuned_sgd():
    data = load_fashion_mnist(str(FOLDER))
    images, labels = data.train_images[:10_000], data.train_labels[:10_000]
    ours = losses_of(keras_kfc.KFC(seed=1), images, labels, iterations=80, every=5)
    assert ours[-1] <= TARGET
    iterations = 5 * 5 * len(ours)
    sgd = {
        rate: losses_of(keras.optimizers.SGD(rate, momentum=0.9), images, labels, iterations, 25)
        for rate in SGD_RATES
    }
    best = min(sgd, key=lambda rate: np.nanmin(sgd[rate]))
    assert min(sgd[best]) > TARGET, f"SGD({best}) reached {TARGET} as well: {sgd[best]}"
    # SGD learns, too, and its best rate lies inside of the grid.
    assert min(sgd[best]) < 1.0
    assert best not in (SGD_RATES[0], SGD_RATES[-1])
