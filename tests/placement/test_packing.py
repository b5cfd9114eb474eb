"""Tensors packed for an exchange, and matrices shared out among replicas."""

import numpy as np
import pytest
import tensorflow as tf

from keras_kfc.placement.packing import from_upper_triangles, pack, unpack, upper_triangles
from keras_kfc.placement.sharded import shares_of

RNG = np.random.default_rng(0)


def symmetric(count, size):
    rows = RNG.normal(size=(count, size, size)).astype("float32")
    return rows + rows.transpose(0, 2, 1)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7, 8, 600, 1027])
def test_upper_triangles_hold_each_entry_once(size):
    matrices = symmetric(3, size)
    rows = upper_triangles(tf.constant(matrices))
    first, second = np.triu_indices(size)
    assert rows.shape == (3, len(first))
    np.testing.assert_array_equal(np.sort(rows), np.sort(matrices[:, first, second]))
    np.testing.assert_array_equal(from_upper_triangles(rows, size), matrices)


def test_the_lower_triangle_is_not_read():
    matrices = symmetric(2, 5)
    spoilt = np.triu(matrices) + np.tril(np.full_like(matrices, np.nan), -1)
    rows = upper_triangles(tf.constant(spoilt))
    np.testing.assert_array_equal(from_upper_triangles(rows, 5), matrices)


def test_tensors_come_back_from_the_vector():
    tensors = [symmetric(2, 4), RNG.normal(size=(3, 3)).astype("float32"), symmetric(1, 5)]
    tensors.append(np.float32(7).reshape(()))
    triangular = [True, False, True, False]
    vector = pack([tf.constant(tensor) for tensor in tensors], triangular)
    assert vector.shape == (2 * 10 + 9 + 15 + 1,)
    back = unpack(vector, [tensor.shape for tensor in tensors], triangular)
    for one, other in zip(back, tensors, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("replicas", [1, 2, 3, 8])
def test_shares_are_whole_and_even(replicas):
    shapes = [(5, 30, 30), (2, 64, 64), (9, 16, 16), (1, 50, 50)]
    shares = shares_of(shapes, replicas)
    assert len(shares) == replicas
    for stack, (count, _, _) in enumerate(shapes):
        parts = [(share.starts[stack], share.shapes[stack][0]) for share in shares]
        assert [number for start, part in parts for number in range(start, start + part)] == list(
            range(count)
        )
    loads = [sum(count * size**3 for count, size, _ in share.shapes) for share in shares]
    total = sum(count * size**3 for count, size, _ in shapes)
    assert sum(loads) == total
    # Greedy: no more than the mean and the largest matrix.
    assert max(loads) <= total / replicas + 64**3


def test_a_replica_may_have_nothing_to_do():
    shares = shares_of([(1, 4, 4)], 3)
    assert [share.length for share in shares] == [10, 0, 0]
