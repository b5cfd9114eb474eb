"""Traces of factors, which are taken of all those of a size together."""

import numpy as np
import pytest
import tensorflow as tf

from keras_kfc.linalg.damping import (
    BlockShape,
    block_traces,
    sums_of,
    traces,
    with_unit_traces,
)

# Groups, parts of each, and rows; sizes recur in no order.
CUT = ((1, 1, 3), (2, 3, 4), (1, 2, 3), (3, 1, 5), (1, 3, 4), (2, 2, 3))


@pytest.mark.parametrize("cases", [CUT, tuple((groups, 1, n) for groups, _, n in CUT)])
def test_each_group_of_each_block_has_its_own_trace(cases):
    rng = np.random.default_rng(0)
    factors = [rng.normal(size=(groups * parts, n, n)) for groups, parts, n in cases]
    expected = [
        sum(np.trace(matrix) for matrix in own)
        for factor, (groups, _, _) in zip(factors, cases, strict=True)
        for own in np.split(factor, groups)
    ]
    groups = [groups for groups, _, _ in cases]
    found = traces([tf.constant(factor) for factor in factors], groups)
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_entries_are_added_where_they_belong():
    values = tf.constant([1.0, 2.0, 4.0, 8.0, 16.0])
    places = [np.array([4]), np.array([0, 2, 1]), np.array([3, 0])]
    np.testing.assert_array_equal(sums_of(values, places), [16.0, 7.0, 9.0])
    np.testing.assert_array_equal(sums_of(values, [places[0], np.array([1])]), [16.0, 2.0])


def test_the_widest_dtype_counts():
    rng = np.random.default_rng(0)
    single, double = rng.normal(size=(1, 3, 3)).astype("float32"), rng.normal(size=(2, 3, 3))
    found = traces([tf.constant(single), tf.constant(double)], [1, 2])
    assert found.dtype == tf.float64
    np.testing.assert_allclose(found[1:], [np.trace(part) for part in double], rtol=1e-14)
    np.testing.assert_allclose(found[0], np.trace(single[0].astype("float64")), rtol=1e-6)


def test_chosen_blocks_are_divided_by_the_trace_of_each_group():
    """One of two groups in parts, one of zeros, one that is not chosen."""
    rng = np.random.default_rng(0)
    shapes = [BlockShape(2, 3, 8), BlockShape(1, 3, 4), BlockShape(2, 3, 4)]
    gammas = [rng.normal(size=(count, 4, 4)) for count in (4, 1, 2)]
    gammas = [part @ part.transpose(0, 2, 1) for part in gammas]
    gammas[1] *= 0
    omegas = [rng.normal(size=(shape.groups, 3, 3)) for shape in shapes]
    constants = [[tf.constant(part) for part in own] for own in (omegas, gammas)]
    before = block_traces(*constants, shapes)
    found, after = with_unit_traces(constants[1], before, [True, True, False])
    for group in (0, 1):
        own = gammas[0][2 * group : 2 * group + 2]
        expected = own / sum(np.trace(part) for part in own)
        np.testing.assert_allclose(found[0][2 * group : 2 * group + 2], expected, rtol=1e-12)
    assert not np.any(found[1])
    np.testing.assert_array_equal(found[2], gammas[2])
    kept = [np.trace(part) for part in gammas[2]]
    np.testing.assert_allclose(after.gamma, [1, 1, 0, *kept], rtol=1e-12)
    np.testing.assert_array_equal(after.omega, before.omega)
    # None is chosen: nothing is touched.
    same, untouched = with_unit_traces(constants[1], before, [False] * 3)
    assert untouched is before and all(a is b for a, b in zip(same, constants[1], strict=True))
