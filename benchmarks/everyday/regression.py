"""Tasks with numbers to predict: raw, noisy, heavy-tailed, counts, quantiles, several at once."""

import functools

import keras
import numpy as np
from keras import layers, ops
from sklearn import datasets

from benchmarks.everyday.classification import perceptron
from benchmarks.everyday.task import Data, Task, register, split


def _diabetes(rng, scale):
    x, y = datasets.load_diabetes(return_X_y=True, scaled=False)
    order = rng.permutation(len(x))
    x, y = x[order].astype("float32"), y[order]
    x = (x - x.mean(0)) / x.std(0)
    y = scale * y if scale else (y - y.mean()) / y.std()
    return split(x, y.astype("float32"), 80)


def _sine(rng, examples=1500):
    x = rng.uniform(-2, 2, size=(examples, 1)).astype("float32")
    y = np.sin(2 * x) + 0.5 * rng.normal(size=x.shape)
    grid = np.linspace(-2, 2, 400)[:, None].astype("float32")
    return Data(x, y.astype("float32"), grid, np.sin(2 * grid))


def _surface(x):
    return np.sin(x[:, 0]) + x[:, 1] * x[:, 2] - 0.5 * x[:, 3] ** 2


def _heavy_tails(rng):
    x = rng.normal(size=(2500, 8)).astype("float32")
    y = _surface(x) + 0.3 * rng.standard_t(1.5, size=2500)
    y[-500:] = _surface(x[-500:])
    return split(x, y.astype("float32")[:, None], 500)


def _counts(rng):
    x = rng.normal(size=(2500, 8)).astype("float32")
    y = rng.poisson(np.exp(0.6 * _surface(x).clip(-3, 3)))
    return split(x, y.astype("float32")[:, None], 500)


def _least_poisson(data):
    return np.mean(data.y - data.y * np.log(np.maximum(data.y, 1)))


def _two_outputs(rng):
    x = rng.normal(size=(2000, 8)).astype("float32")
    first = np.stack([_surface(x), x[:, 4] * x[:, 5], np.tanh(x[:, 6])], 1)
    second = 30 * np.abs(x[:, 7:]) + 5 * x[:, :1]
    y = {"shape": first.astype("float32"), "size": second.astype("float32")}
    return split(x, y, 400)


def _two_heads():
    inputs = keras.Input((8,))
    hidden = layers.Dense(48, "relu")(layers.Dense(48, "relu")(inputs))
    outputs = {
        "shape": layers.Dense(3, name="shape")(hidden),
        "size": layers.Dense(1, name="size")(hidden),
    }
    return keras.Model(inputs, outputs)


def _line(rng):
    x = rng.normal(size=(2000, 30)) * np.geomspace(1, 0.1, 30)
    y = x @ rng.normal(size=30) + 0.6 * rng.normal(size=2000) + 3
    return split(x.astype("float32"), y.astype("float32")[:, None], 400)


def _quantile(level, y_true, y_pred):
    error = y_true - y_pred
    return ops.mean(ops.maximum(level * error, (level - 1) * error), axis=-1)


def quantile_90(y_true, y_pred):
    """Pinball loss of the 90th percentile."""
    return _quantile(0.9, y_true, y_pred)


def shifted_error(y_true, y_pred):
    """A squared error as somebody wrote it, with a constant from a likelihood."""
    return ops.mean(ops.square(y_true - y_pred), axis=-1) + 1e4


def scaled_likelihood(y_true, y_pred):
    """Minus the log density of a Gaussian whose mean and log variance are predicted."""
    mean, log_variance = y_pred[..., :1], y_pred[..., 1:]
    squared = ops.square(y_true - mean) * ops.exp(-log_variance)
    return 0.5 * ops.mean(squared + log_variance, axis=-1)


def minus_correlation(y_true, y_pred):
    """Minus the correlation over the batch: negative, and not a sum over examples."""
    a = y_true - ops.mean(y_true)
    b = y_pred - ops.mean(y_pred)
    return -ops.mean(a * b) / (ops.std(y_true) * ops.std(y_pred) + 1e-6)


def _changing_noise(rng):
    x = rng.uniform(-2, 2, size=(2000, 1)).astype("float32")
    y = np.sin(2 * x) + (0.1 + 0.2 * np.abs(x)) * rng.normal(size=x.shape)
    return split(x, y.astype("float32"), 400)


@functools.cache
def _photograph():
    # Not `load_sample_image`, which needs Pillow: the digits as one picture serve as well.
    images = datasets.load_digits().images[:64].reshape(8, 8, 8, 8)
    return images.transpose(0, 2, 1, 3).reshape(64, 64) / 16


def _picture(rng):
    image = _photograph()
    grid = np.stack(np.meshgrid(*2 * [np.linspace(-1, 1, 64)], indexing="ij"), -1).reshape(-1, 2)
    waves = grid @ np.random.default_rng(5).normal(size=(2, 32)) * 8
    x = np.concatenate([np.sin(waves), np.cos(waves)], 1).astype("float32")
    y = image.reshape(-1, 1).astype("float32")
    order = rng.permutation(len(x))
    return split(x[order], y[order], 512)


def _recommender():
    user, item = keras.Input((1,), name="user"), keras.Input((1,), name="item")
    left = layers.Flatten()(layers.Embedding(200, 8)(user))
    right = layers.Flatten()(layers.Embedding(100, 8)(item))
    hidden = layers.Dense(32, "relu")(layers.Concatenate()([left, right]))
    outputs = layers.Dense(1)(hidden)
    return keras.Model({"user": user, "item": item}, outputs)


def _ratings(rng):
    users, items = rng.normal(size=(200, 3)), rng.normal(size=(100, 3))
    user, item = rng.integers(0, 200, 5000), rng.integers(0, 100, 5000)
    y = np.sum(users[user] * items[item], 1) + 0.5 * rng.normal(size=5000)
    x = {"user": user[:, None], "item": item[:, None]}
    return split(x, y.astype("float32")[:, None], 1000)


register(
    Task(
        "raw targets",
        lambda rng: _diabetes(rng, 1000),
        lambda: perceptron(10, 1, units=64),
        "mse",
        (4, 32, 256),
        (600, 400, 300),
    ),
    Task(
        "diabetes",
        lambda rng: _diabetes(rng, None),
        lambda: perceptron(10, 1),
        "mse",
        (4, 32),
        (400, 300),
        held_out=True,
    ),
    Task(
        "noisy sine",
        _sine,
        lambda: perceptron(1, 1, units=64),
        "mse",
        (1, 32, 256),
        (800, 800, 400),
    ),
    Task(
        "line",
        _line,
        lambda: keras.Sequential([keras.Input((30,)), layers.Dense(1)]),
        "mse",
        (4, 32),
        (800, 600),
    ),
    Task(
        "heavy tails, Huber",
        _heavy_tails,
        lambda: perceptron(8, 1, units=48),
        keras.losses.Huber(),
        (32, 256),
        (500, 250),
    ),
    Task(
        "heavy tails, absolute",
        _heavy_tails,
        lambda: perceptron(8, 1, units=48),
        "mae",
        (4, 32),
        (800, 500),
        held_out=True,
    ),
    Task(
        "counts",
        _counts,
        lambda: perceptron(8, 1, "exponential"),
        "poisson",
        (4, 32, 256),
        (800, 400, 200),
        floor=_least_poisson,
    ),
    Task(
        "quantile",
        _heavy_tails,
        lambda: perceptron(8, 1, units=48),
        quantile_90,
        (32, 256),
        (500, 250),
    ),
    Task(
        "two heads",
        _two_outputs,
        _two_heads,
        {"shape": "mse", "size": "mse"},
        (4, 32),
        (600, 400),
        {"loss_weights": {"shape": 1.0, "size": 0.1}},
    ),
    Task(
        "a constant in the loss",
        _sine,
        lambda: perceptron(1, 1, units=64),
        shifted_error,
        (32,),
        (800,),
        floor=1e4,
    ),
    Task(
        "mean and variance",
        _changing_noise,
        lambda: perceptron(1, 2, units=32),
        scaled_likelihood,
        (32, 256),
        (600, 300),
        floor=-1.2,
    ),
    Task(
        "correlation",
        lambda rng: _diabetes(rng, None),
        lambda: perceptron(10, 1),
        minus_correlation,
        (32, 128),
        (300, 200),
        floor=-1.0,
        held_out=True,
    ),
    Task(
        "picture",
        _picture,
        lambda: perceptron(64, 1, "sigmoid", 64),
        "mse",
        (32, 256),
        (500, 300),
        held_out=True,
    ),
    Task("ratings", _ratings, _recommender, "mse", (32, 256), (600, 300)),
)
