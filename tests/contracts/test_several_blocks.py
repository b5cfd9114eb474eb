"""Numbers of several blocks are one vector: none may get another's."""

import numpy as np
import tensorflow as tf
from test_structures import Example

from keras_kfc.curvature.averaging import move_averages, store_inverses


def test_each_of_several_blocks_has_its_own_numbers():
    """One block refuses its moments, and later its inverses; the others take theirs, in order."""
    examples = [Example("kronecker", "dense", True) for _ in range(4)]
    blocks = [example.block for example in examples]
    batch = tf.constant(6.0), tf.constant(0.5), tf.constant(True)
    # The last one has seen nothing yet.
    move_averages(blocks[:3], [example.moments() for example in examples[:3]], *batch)
    # The first one has seen more than the others: all rates and weights differ.
    move_averages(blocks[:1], [examples[0].moments()], *batch)
    before = [example.factors() for example in examples[:3]]
    scales = (2.0, np.nan, 3.0)
    moments = [one.moments(scale) for one, scale in zip(examples, scales, strict=False)]
    refused = move_averages(blocks[:3], moments, *batch)
    np.testing.assert_array_equal(refused, [False, True, False])
    assert [float(block.ema_weight) for block in blocks] == [10.5, 6.0, 9.0, 0.0]
    for number, rate in ((0, 6 / 10.5), (1, 0.0), (2, 6 / 9)):
        for old, new, own in zip(
            before[number], examples[number].factors(), moments[number], strict=True
        ):
            expected = old + rate * (own - old) if rate else old
            np.testing.assert_allclose(new, expected, rtol=1e-6)

    shapes = [block.layout.inverse_shapes.values() for block in blocks]
    inverses = [[tf.fill(shape, 1.0 + n) for shape in own] for n, own in enumerate(shapes)]
    inverses[2][0] *= np.nan
    inverses = [[tf.cast(part, tf.float64) for part in own] for own in inverses]
    refused = store_inverses(blocks, inverses)
    np.testing.assert_array_equal(refused, [False, False, True, False])
    assert [float(block.has_inverses) for block in blocks] == [1.0, 1.0, 0.0, 0.0]
    kept = [float(block.state["gamma_inverse"].numpy().max()) for block in blocks]
    assert kept == [1.0, 2.0, 0.0, 0.0]
