"""Factors from a sample of a batch's examples."""

import numpy as np
import pytest
import tensorflow as tf
from helpers import few
from nets import conv_net, image_batch, train

import keras_kfc
from conftest import relative_error
from keras_kfc.curvature.layout import KroneckerLayout
from keras_kfc.maps.conv import Conv2DMap
from keras_kfc.maps.dense import DenseMap
from keras_kfc.passes.statistics import ExampleSubset, draw_examples

BATCH = 6


def factors(partition, sample, inputs, derivatives):
    omega = partition.omega(*sample.take([tf.constant(inputs)]))
    return omega, partition.gamma(sample.take([tf.constant(derivatives)])[0])


@pytest.mark.parametrize("rows_per_example", [1, 4])
@pytest.mark.parametrize("count", few([1, 2, 5, 6, 9], 3))
def test_the_mean_over_all_samples_is_the_factor_of_the_batch(rows_per_example, count):
    """Which is what unbiased means: every start is as likely as the others."""
    rng = np.random.default_rng(0)
    length = BATCH * rows_per_example
    cases = [
        (
            DenseMap(3, 2),
            rng.normal(size=(length, 5, 3)),
            rng.normal(size=(length, 5, 2)),
        ),
        (
            Conv2DMap((2, 2), 3, 2, padding="same"),
            rng.normal(size=(length, 4, 5, 3)),
            rng.normal(size=(length, 4, 5, 2)),
        ),
    ]
    for geometry, inputs, derivatives in cases:
        partition = KroneckerLayout(geometry, use_bias=True)
        expected = factors(partition, ExampleSubset(BATCH), inputs, derivatives)
        starts = (np.arange(length) + 0.5) / length
        results = [
            factors(
                partition,
                ExampleSubset(BATCH, count, tf.constant(start, tf.float32)),
                inputs,
                derivatives,
            )
            for start in starts
        ]
        for number, whole in enumerate(expected):
            mean = np.mean([result[number] for result in results], axis=0)
            np.testing.assert_allclose(mean, whole, rtol=1e-6, atol=1e-9)
            spread = max(relative_error(result[number], whole) for result in results)
            assert spread > 0.01 if count < BATCH else spread < 1e-6


def test_starts_are_drawn_anew_for_each_step_and_repeat_under_a_seed():
    starts = [
        float(draw_examples(tf.constant(8), 2, tf.constant([5, step], tf.int64)).start)
        for step in (1, 2, 3, 1)
    ]
    assert starts[0] == starts[3]
    assert len(set(starts)) == 3
    assert all(0 <= start < 1 for start in starts)


@pytest.mark.nightly
def test_training_with_a_sample_learns_and_a_sample_of_all_changes_nothing():
    options = {"seed": 1, "fisher": "exact", "curvature_update_period": 2}
    weights = {}
    for samples in (None, 8, 32):
        model = conv_net()
        optimizer = keras_kfc.KFC(factor_batch_size=samples, **options)
        weights[samples] = train(model, optimizer, steps=8)
        loss = model.evaluate(*image_batch(), verbose=0)
        assert loss < 0.9
    np.testing.assert_allclose(weights[32], weights[None], atol=1e-4)
    assert relative_error(weights[8], weights[None]) > 1e-3


@pytest.mark.nightly
def test_samples_are_drawn_under_xla():
    model = conv_net()
    train(model, keras_kfc.KFC(factor_batch_size=8, seed=1), steps=8, jit_compile=True)
    assert model.evaluate(*image_batch(), verbose=0) < 0.9
