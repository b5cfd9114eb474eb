"""EinsumDense and the layers that are made of it."""

import keras
import numpy as np
import pytest
from helpers import few
from keras import layers

import keras_kfc
from conftest import relative_error
from keras_kfc.maps.einsum import EinsumMap, labels_of

RNG = np.random.default_rng(0)


def trained(layer, reshaped, x, y):
    """Weights after four steps, where the layer sees inputs in another shape."""
    inputs = keras.Input(x.shape[1:], dtype="float64")
    hidden = layers.Reshape(reshaped, dtype="float64")(inputs)
    outputs = layers.Reshape(y.shape[1:], dtype="float64")(layer(hidden))
    model = keras_kfc.instrument(keras.Model(inputs, outputs))
    shapes = [w.shape for w in layer.get_weights()]
    rng = np.random.default_rng(3)
    layer.set_weights([rng.normal(size=int(np.prod(s))).reshape(s) for s in shapes])
    model.compile(keras_kfc.KFC(fisher="exact"), "mse")
    model.fit(x, y, epochs=4, batch_size=len(x), verbose=0)
    assert len(model.optimizer.blocks) == 1
    return [w.ravel() for w in layer.get_weights()]


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("equation", "output_shape", "bias_axes", "split"),
    few(
        [
            ("abc,cde->abde", (None, 2, 3), "de", False),
            ("abcd,cde->abe", (None, 6), "e", True),
            ("abc,cd->abd", (None, 6), "d", False),
            ("...c,ce->...e", 6, "e", False),
        ],
        1,
    ),
)
def test_it_trains_as_a_dense_layer_on_reshaped_tensors(equation, output_shape, bias_axes, split):
    x, y = RNG.normal(size=(5, 3, 8)), RNG.normal(size=(5, 3, 6))
    einsum = layers.EinsumDense(equation, output_shape, bias_axes=bias_axes, dtype="float64")
    dense = layers.Dense(6, dtype="float64")
    ours = trained(einsum, (3, 2, 4) if split else (3, 8), x, y)
    expected = trained(dense, (3, 8), x, y)
    for one, other in zip(ours, expected, strict=True):
        assert relative_error(one, other) < 1e-9


@pytest.mark.parametrize(
    "equation", ["abc,d->abd", "abc,cd->ad", "abc,acd->abd", "aab,bc->ac", "abc,cd->bad"]
)
def test_what_is_no_product_of_matrices_is_refused_by_name(equation):
    labels = labels_of(equation, 3)
    sizes = {label: size for size, label in enumerate("abcd", start=2)}
    with pytest.raises(ValueError, match="must be a product of matrices"):
        EinsumMap(*labels, tuple(sizes[label] for label in labels[1]))


def test_letters_stand_for_left_out_axes():
    assert labels_of("...x, xy -> ...y", 4) == ("abcx", "xy", "abcy")
    assert labels_of("ab...,bc->ac...", 4) == ("abde", "bc", "acde")


@pytest.mark.slow
def test_attention_has_a_block_for_each_projection_and_computes_as_before():
    keras.utils.set_random_seed(1)
    inputs = keras.Input((4, 6))
    grouped = layers.GroupQueryAttention(3, 4, 2)(inputs, inputs)
    outputs = layers.MultiHeadAttention(2, 3)(grouped, inputs, use_causal_mask=True)
    model = keras.Model(inputs, outputs)
    x = RNG.normal(size=(5, 4, 6)).astype("float32")
    plain = model(x)
    keras_kfc.instrument(model)
    np.testing.assert_array_equal(model(x), plain)
    coverage = keras_kfc.coverage(model)
    assert len(coverage.covered) == 8 and not coverage.fallback
    model.compile(keras_kfc.KFC(seed=1), "mse")
    losses = model.fit(x, x, epochs=20, verbose=0).history["loss"]
    assert losses[-1] < 0.7 * losses[0]
    assert len(model.optimizer.blocks) == 8


def test_a_bias_that_heads_share_is_left_to_the_fallback_rule():
    layer = layers.EinsumDense("abc,cde->abde", (None, 2, 3), bias_axes="e")
    model = keras_kfc.instrument(keras.Sequential([keras.Input((4, 6)), layer]))
    optimizer = keras_kfc.KFC()
    optimizer.build(model.trainable_variables)
    (block,) = optimizer.blocks
    assert block.indices.bias is None and not block.layout.use_bias
