"""Small networks and data that several test modules train."""

import keras
import numpy as np
from keras import layers as plain_layers

import keras_kfc
from keras_kfc import layers as kfc_layers


def image_batch(examples=32, seed=0, dtype="float32"):
    """Learnable images `(examples, 8, 8, 2)` with three classes."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, size=examples)
    prototypes = np.random.default_rng(99).normal(size=(3, 8, 8, 2))
    images = prototypes[labels] + rng.normal(size=(examples, 8, 8, 2))
    return images.astype(dtype), labels


def conv_stack(layers=kfc_layers, batch_norm=True, seed=1):
    """Layers of a small conv net with a batch norm, `layers.Conv2D` and `layers.Dense`."""
    keras.utils.set_random_seed(seed)
    stack = [
        keras.Input((8, 8, 2)),
        layers.Conv2D(4, 3, strides=2, padding="same", name="conv"),
    ]
    if batch_norm:
        stack.append(plain_layers.BatchNormalization(name="norm"))
    return [
        *stack,
        plain_layers.ReLU(),
        plain_layers.Flatten(),
        layers.Dense(3, activation="softmax", name="dense"),
    ]


def conv_net(layers=kfc_layers, model=keras.Sequential, **kwargs):
    """A small conv net; plain `keras.Sequential` of capturing layers by default."""
    return model(conv_stack(layers, **kwargs))


def train(model, optimizer, steps=6, data=None, loss="sparse_categorical_crossentropy", **compiled):
    """Trains on full batches and returns the weights as one vector."""
    images, labels = image_batch() if data is None else data
    model.compile(optimizer=optimizer, loss=loss, **compiled)
    build_optimizer(model)
    model.fit(images, labels, batch_size=len(labels), epochs=steps, shuffle=False, verbose=0)
    return flat_weights(model)


def flat_weights(model):
    """All weights of a model as one float64 vector."""
    return np.concatenate([np.asarray(w, "float64").ravel() for w in model.get_weights()])


def build_optimizer(model):
    """Builds a compiled model's optimizer, where the first step would build it and be traced twice.

    Most of a test's time is tracing.
    """
    if model.built and not model.optimizer.built:
        model.optimizer.build(model.trainable_variables)


def compiled(model=None, loss="sparse_categorical_crossentropy", **options):
    """A compiled small net whose factors and inverses are due at every step."""
    model = conv_net(batch_norm=False) if model is None else model
    periods = {"curvature_update_period": 1, "inverse_update_period": 1, "seed": 3}
    model.compile(optimizer=keras_kfc.KFC(**{**periods, **options}), loss=loss)
    build_optimizer(model)
    return model
