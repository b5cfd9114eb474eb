"""Tasks with classes: balanced, rare, mislabelled, several labels, ordered, weighted."""

import functools
import gzip
import pathlib

import keras
import numpy as np
from keras import layers
from sklearn import datasets

from benchmarks.everyday.task import Data, Task, register, split

FASHION = pathlib.Path("/usr/share/datasets/fashion-mnist")
CROSSENTROPY = "sparse_categorical_crossentropy"


@functools.cache
def digits() -> tuple[np.ndarray, np.ndarray]:
    """Images `(1797, 8, 8, 1)` in [0, 1] and their labels."""
    images, labels = datasets.load_digits(return_X_y=True)
    return (images.reshape(-1, 8, 8, 1) / 16).astype("float32"), labels.astype("int32")


@functools.cache
def fashion(examples: int) -> tuple[np.ndarray, np.ndarray]:
    """The first images `(examples, 28, 28, 1)` of Fashion-MNIST, standardised, and their labels."""
    with gzip.open(FASHION / "train-images-idx3-ubyte.gz") as stream:
        pixels = np.frombuffer(stream.read(16 + examples * 784), "uint8", offset=16)
    with gzip.open(FASHION / "train-labels-idx1-ubyte.gz") as stream:
        labels = np.frombuffer(stream.read(8 + examples), "uint8", offset=8)
    images = pixels.reshape(examples, 28, 28, 1).astype("float32") / 255
    return (images - images.mean()) / images.std(), labels.astype("int32")


def digits_data(rng: np.random.Generator) -> Data:
    """All digits in an order of chance, a fifth for testing."""
    images, labels = digits()
    order = rng.permutation(len(images))
    return split(images[order], labels[order], 360)


def digits_conv(head: int = 10, activation: str | None = "softmax") -> keras.Model:
    """A convolution and a dense layer."""
    return keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            layers.Conv2D(16, 3, activation="relu"),
            layers.Flatten(),
            layers.Dense(head, activation),
        ]
    )


def perceptron(inputs: int, outputs: int, activation: str | None = None, units: int = 32):
    """Two hidden layers of rectifiers."""
    return keras.Sequential(
        [
            keras.Input((inputs,)),
            layers.Dense(units, "relu"),
            layers.Dense(units, "relu"),
            layers.Dense(outputs, activation),
        ]
    )


def _mislabelled(rng):
    images, labels = digits()
    order = rng.permutation(len(images))
    images, labels = images[order], labels[order].copy()
    wrong = rng.random(len(labels)) < 0.2
    wrong[-360:] = False
    labels[wrong] = rng.integers(0, 10, wrong.sum())
    return split(images.reshape(-1, 64), labels, 360)


def _dropout_net():
    return keras.Sequential(
        [
            keras.Input((64,)),
            layers.Dense(64, "relu"),
            layers.Dropout(0.3),
            layers.Dense(64, "relu"),
            layers.Dropout(0.3),
            layers.Dense(10, "softmax"),
        ]
    )


def _rare(rng):
    x = rng.normal(size=(2500, 20)).astype("float32")
    y = (x[:, 0] + x[:, 1] * x[:, 2] > 2.2).astype("float32")
    return split(x, y, 500, np.where(y, 20.0, 1.0).astype("float32"))


def _cancer(rng):
    x, y = datasets.load_breast_cancer(return_X_y=True)
    x = (x - x.mean(0)) / x.std(0)
    order = rng.permutation(len(x))
    return split(x[order].astype("float32"), y[order].astype("float32"), 100)


def _cancer_signs(rng):
    data = _cancer(rng)
    return Data(data.x, 2 * data.y - 1, data.x_test, 2 * data.y_test - 1)


def _several_labels(rng):
    images, labels = digits()
    order = rng.permutation(len(images))
    labels = labels[order]
    sets = ([0, 2, 4, 6, 8], [5, 6, 7, 8, 9], [2, 3, 5, 7], [0, 6, 8, 9], [1, 4, 7])
    y = np.stack([np.isin(labels, members) for members in sets], 1).astype("float32")
    return split(images[order].reshape(-1, 64), y, 360)


def _ordinal(rng):
    x, y = datasets.load_diabetes(return_X_y=True)
    order = rng.permutation(len(x))
    x, y = x[order] / x.std(0), y[order]
    above = y[:, None] > np.quantile(y, [0.2, 0.4, 0.6, 0.8])
    return split(x.astype("float32"), above.astype("float32"), 80)


def _few_wines(rng):
    x, y = datasets.load_wine(return_X_y=True)
    order = rng.permutation(len(x))
    return split(((x - x.mean(0)) / x.std(0))[order].astype("float32"), y[order], 38)


def _fashion_data(rng):
    images, labels = fashion(5000)
    order = rng.permutation(len(images))
    return split(images[order], labels[order], 1000)


def _fashion_bn():
    stack = [keras.Input((28, 28, 1))]
    for filters, kernel in ((16, 5), (32, 3)):
        stack += [
            layers.Conv2D(filters, kernel, use_bias=False),
            layers.BatchNormalization(momentum=0.9),
            layers.ReLU(),
            layers.MaxPooling2D(3, 2),
        ]
    return keras.Sequential([*stack, layers.Flatten(), layers.Dense(10, "softmax")])


def _depthwise():
    stack = [keras.Input((8, 8, 1)), layers.Conv2D(16, 3, padding="same")]
    for _ in range(2):
        stack += [
            layers.BatchNormalization(momentum=0.9),
            layers.ReLU(),
            layers.DepthwiseConv2D(3, padding="same"),
            layers.Conv2D(32, 1),
        ]
    stack += [layers.ReLU(), layers.GlobalAveragePooling2D(), layers.Dense(10, "softmax")]
    return keras.Sequential(stack)


def _layer_norm():
    stack = [keras.Input((64,))]
    for _ in range(3):
        stack += [layers.Dense(48), layers.LayerNormalization(), layers.Activation("gelu")]
    return keras.Sequential([*stack, layers.Dense(10, "softmax")])


def _flat_digits(rng):
    data = digits_data(rng)
    return Data(data.x.reshape(-1, 64), data.y, data.x_test.reshape(-1, 64), data.y_test)


def _one_hot_digits(rng):
    data = digits_data(rng)
    return Data(data.x, np.eye(10)[data.y], data.x_test, np.eye(10)[data.y_test])


def _half_the_classes():
    """A net that knows the digits below 5, with a new head for those above."""
    images, labels = digits()
    known = labels < 5
    body = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            layers.Conv2D(16, 3, activation="relu"),
            layers.Conv2D(32, 3, activation="relu"),
            layers.Flatten(),
        ]
    )
    old = keras.Sequential([body, layers.Dense(5, "softmax")])
    old.compile(keras.optimizers.Adam(3e-3), CROSSENTROPY)
    old.fit(images[known], labels[known], batch_size=32, epochs=6, verbose=0)
    return keras.Sequential([body, layers.Dense(5, "softmax")])


def _other_half(rng):
    images, labels = digits()
    new = np.flatnonzero(labels >= 5)
    new = rng.permutation(new)[:300]
    return split(images[new], labels[new] - 5, 100)


def _smoothed():
    return keras.losses.CategoricalCrossentropy(label_smoothing=0.1)


_SMOOTHED_FLOOR = -(0.91 * np.log(0.91) + 9 * 0.01 * np.log(0.01))

register(
    Task("digits", digits_data, digits_conv, CROSSENTROPY, (1, 4, 32, 256), (800, 800, 300, 150)),
    Task("wrong labels", _mislabelled, _dropout_net, CROSSENTROPY, (32, 256), (500, 250)),
    Task(
        "rare positives",
        _rare,
        lambda: perceptron(20, 1, "sigmoid"),
        "binary_crossentropy",
        (4, 32, 256),
        (800, 500, 250),
    ),
    Task(
        "tumours",
        _cancer,
        lambda: perceptron(30, 1, "sigmoid"),
        keras.losses.BinaryCrossentropy(),
        (1, 32),
        (600, 200),
        held_out=True,
    ),
    Task(
        "tumours, hinge",
        _cancer_signs,
        lambda: perceptron(30, 1),
        "hinge",
        (4, 32),
        (400, 200),
    ),
    Task(
        "several labels",
        _several_labels,
        lambda: perceptron(64, 5, "sigmoid", 64),
        "binary_crossentropy",
        (4, 32, 256),
        (800, 300, 150),
    ),
    Task(
        "ordinal",
        _ordinal,
        lambda: perceptron(10, 4, "sigmoid"),
        "binary_crossentropy",
        (32, 256),
        (300, 200),
        held_out=True,
    ),
    Task(
        "wines", _few_wines, lambda: perceptron(13, 3, "softmax"), CROSSENTROPY, (4, 32), (300, 150)
    ),
    Task(
        "focal loss",
        _one_hot_digits,
        digits_conv,
        keras.losses.CategoricalFocalCrossentropy(),
        (4, 32),
        (600, 300),
    ),
    Task(
        "smoothed labels",
        _one_hot_digits,
        digits_conv,
        _smoothed(),
        (32, 256),
        (300, 150),
        floor=float(_SMOOTHED_FLOOR),
        held_out=True,
    ),
    Task("layer norm", _flat_digits, _layer_norm, CROSSENTROPY, (2, 32), (800, 300)),
    Task("depthwise", digits_data, _depthwise, CROSSENTROPY, (32, 256), (300, 150), held_out=True),
    Task("batch norm", _fashion_data, _fashion_bn, CROSSENTROPY, (32, 256), (250, 120)),
    Task("fine-tuning", _other_half, _half_the_classes, CROSSENTROPY, (4, 32), (200, 100)),
)
