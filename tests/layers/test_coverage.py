"""`coverage` says which layers have a block, and why others have none."""

import keras
import numpy as np
from keras import layers
from nets import conv_net

import keras_kfc


def test_coverage_tells_why_layers_fall_back():
    class Scaled(layers.Dense):
        """A subclass whose outputs are not those of a dense layer."""

        def call(self, inputs):
            return 2 * super().call(inputs)

    class Own(layers.Layer):
        """A layer of a user's own."""

        def build(self, input_shape):
            self.shift = self.add_weight(shape=(input_shape[-1],))

        def call(self, inputs):
            return inputs + self.shift

    frozen = layers.Dense(4, name="frozen")
    frozen.trainable = False
    inputs = keras.Input((6, 8), name="words")
    hidden = layers.TimeDistributed(Scaled(4, name="inner"), name="steps")(inputs)
    hidden = layers.EinsumDense("abc,d->abd", (6, 4), name="ein")(hidden)
    hidden = Own(name="own")(hidden)
    hidden = layers.BatchNormalization(renorm=True, name="norm")(Scaled(4, name="scaled")(hidden))
    hidden = frozen(hidden)
    outputs = layers.Dense(1, name="head")(layers.Flatten()(hidden))
    model = keras_kfc.instrument(keras.Model(inputs, outputs))
    coverage = keras_kfc.coverage(model)
    reasons = {path.split("/")[-1]: reason for path, reason in coverage.fallback.items()}
    assert [path.split("/")[-1] for path in coverage.covered] == ["head"]
    assert reasons["inner"] == "inside TimeDistributed, and may couple examples"
    assert reasons["norm"] == "its weights are no matrix with renorm=True"
    assert reasons["ein"] == "its equation is no product of matrices"
    assert reasons["own"] == "no block for this class"
    assert reasons["scaled"] == "a subclass may compute something else"
    shown = str(coverage)
    for text in ("head", "block", "inside TimeDistributed", "BatchNormalization"):
        assert text in shown
    model.compile(keras_kfc.KFC(), "mse")
    rng = np.random.default_rng(0)
    before = model.get_weights()
    model.fit(rng.normal(size=(8, 6, 8)), rng.normal(size=(8, 1)), verbose=0)
    changed = {
        v.path.split("/")[-2]
        for v, old in zip(model.weights, before, strict=True)
        if np.abs(v.numpy() - old).max() > 0
    }
    assert {"head", "scaled", "norm"} <= changed
    assert "frozen" not in changed


def test_layers_have_names_before_they_are_built():
    model = keras.Sequential([layers.Conv2D(4, 3, name="first"), layers.Dense(2, name="last")])
    assert keras_kfc.coverage(keras_kfc.instrument(model)).covered == ["first", "last"]


def test_the_table_tells_the_share_of_parameters():
    norm = layers.BatchNormalization(renorm=True)
    model = keras.Sequential([keras.Input((4,)), layers.Dense(3), norm])
    assert "1 of 2 layers and 71.4% of the parameters" in str(
        keras_kfc.coverage(keras_kfc.instrument(model))
    )


def test_verbose_prints_the_table(capsys):
    keras_kfc.instrument(conv_net(layers), verbose=True)
    printed = capsys.readouterr().out
    assert "have a block" in printed and "norm" in printed
