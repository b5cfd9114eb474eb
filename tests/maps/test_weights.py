"""Variables of a matrix and its weights."""

import numpy as np
import pytest
import tensorflow as tf

from keras_kfc.maps.dense import DenseMap
from keras_kfc.maps.weights import VariableIndices


@pytest.mark.parametrize("bias", [None, 1])
@pytest.mark.parametrize("kernels", [{4: 5}, {4: 2, 0: 3}], ids=["one kernel", "two kernels"])
def test_rows_of_all_kernels_follow_each_other(kernels, bias):
    rng = np.random.default_rng(0)
    tensors = {index: rng.normal(size=(rows, 3)) for index, rows in kernels.items()}
    if bias is not None:
        tensors[bias] = rng.normal(size=(3,))
    indices = VariableIndices(tuple(kernels), bias, tuple(kernels.values()))
    assert indices.every == tuple(tensors)
    constants = {index: tf.constant(tensor) for index, tensor in tensors.items()}
    weights = indices.stacked(DenseMap(5, 3), constants)
    np.testing.assert_array_equal(weights[0], np.vstack(list(tensors.values())))
    again = indices.unstacked(DenseMap(5, 3), weights)
    assert set(again) == set(tensors)
    for index, tensor in tensors.items():
        np.testing.assert_array_equal(again[index], tensor)
