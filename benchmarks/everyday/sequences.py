"""Tasks on sequences: recurrent, convolutional, attention, bags of words with padding."""

import keras
import numpy as np
from keras import layers, ops

from benchmarks.everyday.classification import CROSSENTROPY, digits, digits_data
from benchmarks.everyday.task import Data, Task, register, split


def _rows(rng):
    data = digits_data(rng)
    return Data(data.x[..., 0], data.y, data.x_test[..., 0], data.y_test)


def _recurrent():
    return keras.Sequential([keras.Input((8, 8)), layers.LSTM(32), layers.Dense(10, "softmax")])


def _waves(rng):
    """Signals `(N, 64, 1)` of three shapes, noisy, with a phase and a frequency of chance."""
    kind = rng.integers(0, 3, 1500)
    phase = rng.uniform(0, 6, (1500, 1)) + np.linspace(0, 25, 64) * rng.uniform(0.6, 1.4, (1500, 1))
    shapes = np.stack([np.sin(phase), np.sign(np.sin(phase)), 2 / np.pi * np.arcsin(np.sin(phase))])
    signals = shapes[kind, np.arange(1500)] + 0.4 * rng.normal(size=phase.shape)
    return split(signals[..., None].astype("float32"), kind, 300)


def _convolutional():
    return keras.Sequential(
        [
            keras.Input((64, 1)),
            layers.Conv1D(16, 5, activation="relu"),
            layers.MaxPooling1D(2),
            layers.Conv1D(16, 5, activation="relu"),
            layers.GlobalAveragePooling1D(),
            layers.Dense(3, "softmax"),
        ]
    )


def _words(rng):
    """Padded sentences of up to 16 of 50 words; whether good words outnumber bad ones."""
    length = rng.integers(4, 17, 2000)
    words = rng.integers(1, 50, (2000, 16)) * (np.arange(16) < length[:, None])
    score = ((words > 0) & (words < 10)).sum(1) - ((words >= 10) & (words < 19)).sum(1)
    return split(words, (score > 0).astype("float32")[:, None], 400)


def _bag_of_words():
    inputs = keras.Input((16,), dtype="int32")
    tensor = layers.Embedding(50, 16, mask_zero=True)(inputs)
    tensor = layers.Dense(16, "relu")(tensor)
    tensor = layers.GlobalAveragePooling1D()(tensor)
    return keras.Model(inputs, layers.Dense(1, "sigmoid")(tensor))


class Positions(layers.Layer):
    """Adds a trained vector to each position."""

    def build(self, shape):
        """Makes the vectors."""
        self.table = self.add_weight(shape=shape[1:], initializer="random_normal")

    def call(self, tensor):
        """Adds."""
        return tensor + self.table


def _transformer(causal):
    inputs = keras.Input((16,), dtype="int32")
    tensor = Positions()(layers.Embedding(50, 24)(inputs))
    for _ in range(2):
        normal = layers.LayerNormalization()(tensor)
        attended = layers.MultiHeadAttention(2, 12)(normal, normal, use_causal_mask=causal)
        tensor = layers.Add()([tensor, attended])
        hidden = layers.Dense(48, "gelu")(layers.LayerNormalization()(tensor))
        tensor = layers.Add()([tensor, layers.Dense(24)(hidden)])
    tensor = layers.LayerNormalization()(tensor)
    if causal:
        return keras.Model(inputs, layers.Dense(50, "softmax")(tensor))
    pooled = layers.GlobalAveragePooling1D()(tensor)
    return keras.Model(inputs, layers.Dense(1, "sigmoid")(pooled))


def _language(rng):
    """Sentences of a small language: the next word is one of three that follow the last."""
    follows = np.random.default_rng(3).integers(0, 50, (50, 3))
    words = np.zeros((1500, 17), "int64")
    words[:, 0] = rng.integers(0, 50, 1500)
    for position in range(16):
        choice = rng.choice(3, size=1500, p=[0.6, 0.3, 0.1])
        words[:, position + 1] = follows[words[:, position], choice]
    return split(words[:, :-1], words[:, 1:], 300)


def _series(rng):
    """The next value of a noisy sum of two waves, from the last 24."""
    time = np.arange(2100)
    series = np.sin(time / 5) + 0.5 * np.sin(time / 13) + 0.2 * rng.normal(size=2100)
    windows = np.lib.stride_tricks.sliding_window_view(series, 25)
    windows = windows[rng.permutation(len(windows))].astype("float32")
    return split(windows[:, :-1, None], windows[:, -1:], 400)


def _gated():
    return keras.Sequential([keras.Input((24, 1)), layers.GRU(24), layers.Dense(1)])


def _pairs(rng, count):
    """Digits beside others of the same class, and others still: `(N, count, 64)`."""
    images, labels = digits()
    flat = images.reshape(-1, 64)
    first = rng.integers(0, len(labels), 1500)
    columns = [first]
    for same in (True, False)[: count - 1]:
        mask = labels[first][:, None] == labels
        chance = rng.random((1500, len(labels))) * (mask if same else ~mask)
        columns.append(chance.argmax(1))
    x = flat[np.stack(columns, 1)]
    return split(x, np.zeros((1500, 1), "float32"), 300)


def _embedder(count):
    inputs = keras.Input((count, 64))
    hidden = layers.Dense(64, "relu")(inputs)
    return keras.Model(inputs, layers.UnitNormalization()(layers.Dense(16)(hidden)))


def triplet(y_true, y_pred):
    """How much nearer than the other the one of the same class should be."""
    anchor, same, other = ops.unstack(y_pred, axis=1)
    near = ops.sum(ops.square(anchor - same), -1)
    far = ops.sum(ops.square(anchor - other), -1)
    return ops.maximum(near - far + 0.5, 0.0)


def contrastive(y_true, y_pred):
    """Which of the batch belongs to which: cross-entropy over all pairs of a batch."""
    scores = ops.matmul(y_pred[:, 0], ops.transpose(y_pred[:, 1])) / 0.2
    return -ops.mean(ops.diagonal(ops.log_softmax(scores)))


def _contrastive_over_parts(model, x, y, weight):
    """Mean over nine parts of 32 examples, whatever batch was trained on."""
    outputs = model(x, training=False)
    parts = ops.reshape(outputs[:288], (9, 32, 2, 16))
    return ops.mean(ops.stack([contrastive(None, part) for part in ops.unstack(parts)]))


def _ranked(rng):
    """Two things each, and whether the first is better, by a judge who errs."""
    x = rng.normal(size=(2000, 2, 8)).astype("float32")
    score = np.sin(x[..., 0]) + x[..., 1] * x[..., 2]
    better = score[:, 0] - score[:, 1] + 0.3 * rng.logistic(size=2000) > 0
    return split(x, better.astype("float32")[:, None], 400)


def _ranker():
    inputs = keras.Input((2, 8))
    hidden = layers.Dense(32, "relu")(layers.Dense(32, "relu")(inputs))
    scores = layers.Dense(1, use_bias=False)(hidden)
    return keras.Model(inputs, scores[:, 0] - scores[:, 1])


register(
    Task("recurrent", _rows, _recurrent, CROSSENTROPY, (4, 32), (500, 400)),
    Task("signals", _waves, _convolutional, CROSSENTROPY, (4, 32), (500, 300)),
    Task("bag of words", _words, _bag_of_words, "binary_crossentropy", (4, 32), (600, 300)),
    Task(
        "transformer",
        _words,
        lambda: _transformer(False),
        "binary_crossentropy",
        (4, 32),
        (400, 250),
    ),
    Task(
        "language",
        _language,
        lambda: _transformer(True),
        CROSSENTROPY,
        (32,),
        (300,),
        floor=0.8,
        held_out=True,
    ),
    Task("forecast", _series, _gated, "mse", (32,), (400,), held_out=True),
    Task(
        "triplets", lambda rng: _pairs(rng, 3), lambda: _embedder(3), triplet, (4, 32), (300, 200)
    ),
    Task(
        "contrastive",
        lambda rng: _pairs(rng, 2),
        lambda: _embedder(2),
        contrastive,
        (32, 256),
        (300, 150),
        measure=_contrastive_over_parts,
    ),
    Task(
        "ranking",
        _ranked,
        _ranker,
        keras.losses.BinaryCrossentropy(from_logits=True),
        (4, 32),
        (500, 300),
        held_out=True,
    ),
)
