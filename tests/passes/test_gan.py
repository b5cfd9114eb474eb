"""Two networks with an optimizer each: each block's factors come from its own loss alone.

Oracles are factors in float64 NumPy, from derivatives by hand.
"""

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import few

import keras_kfc
from conftest import relative_error

BATCH = 6
LATENTS = np.random.default_rng(0).normal(size=(BATCH, 3)).astype("float32")
OTHER_LATENTS = np.random.default_rng(1).normal(size=(BATCH, 3)).astype("float32")
REAL = np.random.default_rng(2).normal(size=(BATCH, 4)).astype("float32")
REAL_LABEL, FAKE_LABEL = 0.0, 1.0
MODES = {
    "eager": {"run_eagerly": True},
    "graph": {"run_eagerly": False},
    "loop": {"run_eagerly": False, "steps_per_execution": 2},
    "unrolled": {"run_eagerly": False, "steps_per_execution": 2},
}


class GAN(keras.Model):
    """After Keras's example of a DCGAN, with Dense layers and latents that stay.

    `order` tells which network is trained first, or that both share one forward pass, as in
    TensorFlow's tutorial.
    """

    def __init__(self, order):
        super().__init__()
        self.order = order
        layers = keras_kfc.layers
        self.generator = keras.Sequential(
            [keras.Input((3,)), layers.Dense(5, "tanh"), layers.Dense(4)], name="generator"
        )
        self.discriminator = keras.Sequential(
            [
                keras.Input((4,)),
                layers.Dense(5, "tanh"),
                keras.layers.Dropout(0.5),
                layers.Dense(1),
            ],
            name="discriminator",
        )
        self.loss_fn = keras.losses.BinaryCrossentropy(from_logits=True)

    def compile(self, make_optimizer, **options):
        super().compile(**options)
        self.d_optimizer, self.g_optimizer = make_optimizer(), make_optimizer()

    def apply(self, optimizer, tape, loss, network):
        gradients = tape.gradient(loss, network.trainable_weights)
        optimizer.apply_gradients(zip(gradients, network.trainable_weights, strict=True))

    def train_discriminator(self, real):
        generated = self.generator(LATENTS)
        combined = tf.concat([generated, real], axis=0)
        labels = tf.concat([FAKE_LABEL * tf.ones((BATCH, 1)), REAL_LABEL * tf.ones((BATCH, 1))], 0)
        with tf.GradientTape() as tape:
            loss = self.loss_fn(labels, self.discriminator(combined))
        self.apply(self.d_optimizer, tape, loss, self.discriminator)

    def train_generator(self):
        with tf.GradientTape() as tape:
            outputs = self.discriminator(self.generator(OTHER_LATENTS))
            loss = self.loss_fn(REAL_LABEL * tf.ones((BATCH, 1)), outputs)
        self.apply(self.g_optimizer, tape, loss, self.generator)

    def train_both(self, real):
        with tf.GradientTape() as g_tape, tf.GradientTape() as d_tape:
            fake_outputs = self.discriminator(self.generator(OTHER_LATENTS))
            real_outputs = self.discriminator(real)
            g_loss = self.loss_fn(REAL_LABEL * tf.ones((BATCH, 1)), fake_outputs)
            d_loss = self.loss_fn(REAL_LABEL * tf.ones((BATCH, 1)), real_outputs)
            d_loss += self.loss_fn(FAKE_LABEL * tf.ones((BATCH, 1)), fake_outputs)
        self.apply(self.g_optimizer, g_tape, g_loss, self.generator)
        self.apply(self.d_optimizer, d_tape, d_loss, self.discriminator)

    def train_step(self, real):
        real.set_shape((BATCH, 4))
        if self.order == "both":
            self.train_both(real)
        elif self.order == "generator first":
            self.train_generator()
            self.train_discriminator(real)
        else:
            self.train_discriminator(real)
            self.train_generator()
        return {"examples": tf.constant(1.0)}


def forward(network, inputs):
    """Extended inputs of both layers and the outputs of a network of two layers, in float64."""
    first, second = (layer for layer in network.layers if layer.weights)
    (kernel, bias), (out_kernel, out_bias) = (
        [np.asarray(w, "float64") for w in layer.get_weights()] for layer in (first, second)
    )
    hidden = np.tanh(inputs @ kernel + bias)
    ones = np.ones((len(inputs), 1))
    extended = [np.hstack([inputs, ones]), np.hstack([hidden, ones])]
    return extended, hidden @ out_kernel + out_bias, (kernel, out_kernel)


def backward(extended, kernels, derivatives):
    """Derivatives of both layers' pre-activations and of the inputs, from those of outputs."""
    hidden = extended[1][:, :-1]
    first = derivatives @ kernels[1].T * (1 - hidden**2)
    return [first, derivatives], first @ kernels[0].T


def naive_factors(model, latents, real):
    """Factors of all four layers: of the discriminator's loss, of the generator's, in turn."""

    def of(extended, derivatives):
        omegas = [a.T @ a / BATCH for a in extended]
        return list(zip(omegas, [d.T @ d / len(d) for d in derivatives], strict=True))

    def sigmoid(outputs):
        return 1 / (1 + np.exp(-outputs))

    fake = forward(model.generator, latents)[1]
    extended, outputs, kernels = forward(model.discriminator, np.concatenate([fake, real]))
    labels = np.repeat([[FAKE_LABEL], [REAL_LABEL]], BATCH, axis=0)
    # In one batch of both, the mean is over twice as many examples.
    derivatives, _ = backward(extended, kernels, sigmoid(outputs) - labels)
    share = 1.0 if model.order == "both" else 0.5
    discriminator = [(share * omega, gamma) for omega, gamma in of(extended, derivatives)]

    extended, fake, kernels = forward(model.generator, OTHER_LATENTS)
    through, outputs, d_kernels = forward(model.discriminator, fake)
    d_derivatives, back = backward(through, d_kernels, sigmoid(outputs) - REAL_LABEL)
    generator = of(extended, backward(extended, kernels, back)[0])
    return discriminator, generator, of(through, d_derivatives)


def kfc():
    options = {"curvature_update_period": 1, "curvature_ema": 0.0, "learning_rate": 0.0}
    options["weight_sharing"] = "expand"
    return keras_kfc.KFC(seed=1, **options)


def assert_factors(blocks, expected):
    for block, (omega, gamma) in zip(blocks, expected, strict=True):
        assert relative_error(block.omega[0], omega) < 1e-4
        assert relative_error(block.gamma[0], gamma) < 1e-4


@pytest.mark.parametrize(
    ("order", "mode"),
    few(
        [
            ("discriminator first", "eager"),
            pytest.param("discriminator first", "graph", marks=pytest.mark.nightly),
            ("discriminator first", "loop"),
            pytest.param("generator first", "eager", marks=pytest.mark.nightly),
            ("generator first", "graph"),
            pytest.param("generator first", "unrolled", marks=pytest.mark.nightly),
            ("both", "eager"),
            pytest.param("both", "graph", marks=pytest.mark.nightly),
        ],
        1,
    ),
)
def test_factors_of_a_gan_are_those_of_each_network_and_its_own_loss(order, mode, caplog):
    model = GAN(order)
    model.compile(kfc, **MODES[mode])
    if mode == "unrolled":
        model.unrolled_steps_per_execution = 2
    # A first step builds the optimizers.
    model.fit(np.concatenate([REAL] * 2), batch_size=BATCH, epochs=2, shuffle=False, verbose=0)
    latents = OTHER_LATENTS if order == "both" else LATENTS
    discriminator, generator, wrong = naive_factors(model, latents, REAL)
    assert_factors(model.d_optimizer.blocks, discriminator)
    assert_factors(model.g_optimizer.blocks, generator)
    # Negative control: the generator's loss gives the discriminator other factors.
    for block, (omega, gamma) in zip(model.d_optimizer.blocks, wrong, strict=True):
        assert (
            max(relative_error(block.gamma[0], gamma), relative_error(block.omega[0], omega)) > 0.1
        )
    ours = [record for record in caplog.records if record.name == "keras_kfc"]
    assert {record.getMessage()[:30] for record in ours} == {"KFC uses the empirical Fisher "}


@pytest.mark.slow
def test_a_gan_trains():
    model = GAN("discriminator first")
    model.compile(lambda: keras_kfc.KFC(seed=1))
    before = [w.copy() for w in model.get_weights()]
    model.fit(np.concatenate([REAL] * 4), batch_size=BATCH, epochs=2, shuffle=False, verbose=0)
    for old, new in zip(before, model.get_weights(), strict=True):
        assert np.isfinite(new).all() and relative_error(new, old) > 0
    assert int(model.d_optimizer.skipped_steps) == int(model.g_optimizer.skipped_steps) == 0


@pytest.mark.parametrize("run_eagerly", [True, pytest.param(False, marks=pytest.mark.nightly)])
def test_an_encoder_and_a_decoder_with_an_optimizer_each_and_one_loss(run_eagerly):
    """One tape; all gradients are taken before the first of the optimizers steps."""

    class Both(GAN):
        def train_step(self, real):
            real.set_shape((BATCH, 4))
            encoder, decoder = self.generator, self.discriminator
            with tf.GradientTape() as tape:
                outputs = decoder(encoder(OTHER_LATENTS))
                loss = self.loss_fn(REAL_LABEL * tf.ones((BATCH, 1)), outputs)
            weights = [encoder.trainable_weights, decoder.trainable_weights]
            gradients = tape.gradient(loss, weights)
            for optimizer, grads, own in zip(
                (self.g_optimizer, self.d_optimizer), gradients, weights, strict=True
            ):
                optimizer.apply_gradients(zip(grads, own, strict=True))
            return {"examples": tf.constant(1.0)}

    model = Both("one loss")
    model.compile(kfc, run_eagerly=run_eagerly)
    model.fit(np.concatenate([REAL] * 2), batch_size=BATCH, shuffle=False, verbose=0)
    _, encoder, decoder = naive_factors(model, LATENTS, REAL)
    assert_factors(model.g_optimizer.blocks, encoder)
    assert_factors(model.d_optimizer.blocks, decoder)
