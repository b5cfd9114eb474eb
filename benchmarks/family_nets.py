"""Networks of the kinds that people train, small enough for two cores, and data for them.

Images are Fashion-MNIST's; text is the source code of Python's standard library, which is wherever
Python is: the next character is to be told from those before it.
"""

import pathlib
import sysconfig
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import layers, ops

from benchmarks.tasks import load_fashion_mnist

CHARACTERS = 96
LENGTH = 64


class Positions(layers.Layer):
    """Adds a row of a trained table to each position."""

    def build(self, input_shape: Any) -> None:
        """Makes the table."""
        self.length, width = input_shape[1:]
        self.table = layers.Embedding(self.length, width)
        self.table.build((1, self.length))

    def call(self, inputs: Any) -> Any:
        """Adds the rows."""
        return inputs + self.table(ops.arange(self.length)[None])


def _images(rng: np.random.Generator) -> tuple[Any, ...]:
    del rng
    data = load_fashion_mnist("/usr/share/datasets/fashion-mnist")
    train, test = slice(10_000), slice(2_000)
    return (
        data.train_images[train],
        data.train_labels[train],
        data.test_images[test],
        data.test_labels[test],
    )


def _rows(rng: np.random.Generator) -> tuple[Any, ...]:
    x, y, x_test, y_test = _images(rng)
    return x[..., 0], y, x_test[..., 0], y_test


def _pixels(rng: np.random.Generator) -> tuple[Any, ...]:
    """Images with noise; the clothes' pixels are to be told from the background."""
    x, _, x_test, _ = _images(rng)
    noisy = [part + rng.normal(size=part.shape).astype("float32") for part in (x, x_test)]
    return noisy[0], (x > 0).astype("int32"), noisy[1], (x_test > 0).astype("int32")


def _characters(rng: np.random.Generator) -> tuple[Any, ...]:
    """Pieces of source code, `(N, 64)`, and the characters that come next."""
    folder = pathlib.Path(sysconfig.get_paths()["stdlib"])
    text = "".join(path.read_text("latin1") for path in sorted(folder.glob("*.py"))[:60])
    codes = np.frombuffer(text.encode("latin1", "replace"), np.uint8).astype("int32")
    codes = np.where((codes >= 32) & (codes < 127), codes - 31, 0)
    held_out = len(codes) * 9 // 10

    def pieces(first: int, last: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        starts = rng.integers(first, last - LENGTH - 1, count)
        windows = codes[starts[:, None] + np.arange(LENGTH + 1)]
        return windows[:, :-1], windows[:, 1:]

    return (*pieces(0, held_out, 10_000), *pieces(held_out, len(codes), 1_000))


def _mobile() -> keras.Model:
    def block(tensor: Any, filters: int, strides: int) -> Any:
        tensor = layers.DepthwiseConv2D(3, strides, "same", use_bias=False)(tensor)
        tensor = layers.ReLU()(layers.BatchNormalization(momentum=0.9)(tensor))
        tensor = layers.Conv2D(filters, 1, use_bias=False)(tensor)
        return layers.ReLU()(layers.BatchNormalization(momentum=0.9)(tensor))

    inputs = keras.Input((28, 28, 1))
    tensor = layers.Conv2D(16, 3, 2, "same", use_bias=False)(inputs)
    tensor = layers.ReLU()(layers.BatchNormalization(momentum=0.9)(tensor))
    for filters, strides in ((32, 1), (64, 2), (64, 1)):
        tensor = block(tensor, filters, strides)
    return _classifier(inputs, layers.GlobalAveragePooling2D()(tensor))


def _residual(norm: Callable[[], keras.Layer]) -> keras.Model:
    def block(tensor: Any, filters: int, strides: int) -> Any:
        branch = layers.Conv2D(filters, 3, strides, "same", use_bias=False)(tensor)
        branch = layers.ReLU()(norm()(branch))
        branch = norm()(layers.Conv2D(filters, 3, padding="same", use_bias=False)(branch))
        if strides > 1 or tensor.shape[-1] != filters:
            tensor = layers.Conv2D(filters, 1, strides, use_bias=False)(tensor)
        return layers.ReLU()(branch + tensor)

    inputs = keras.Input((28, 28, 1))
    tensor = layers.Conv2D(8, 3, 2, "same", use_bias=False)(inputs)
    tensor = layers.ReLU()(norm()(tensor))
    for filters, strides in ((8, 1), (16, 2), (32, 2)):
        tensor = block(tensor, filters, strides)
    return _classifier(inputs, layers.GlobalAveragePooling2D()(tensor))


def _encoder(tensor: Any, blocks: int, width: int, causal: bool) -> Any:
    for _ in range(blocks):
        normed = layers.LayerNormalization()(tensor)
        attention = layers.MultiHeadAttention(4, width // 4)
        tensor = tensor + attention(normed, normed, use_causal_mask=causal)
        normed = layers.LayerNormalization()(tensor)
        tensor = tensor + layers.Dense(width)(layers.Dense(2 * width, "gelu")(normed))
    return layers.LayerNormalization()(tensor)


def _vit() -> keras.Model:
    inputs = keras.Input((28, 28, 1))
    tensor = layers.Reshape((49, 48))(layers.Conv2D(48, 4, 4)(inputs))
    tensor = _encoder(Positions()(tensor), 2, 48, False)
    return _classifier(inputs, layers.GlobalAveragePooling1D()(tensor))


def _text_transformer() -> keras.Model:
    inputs = keras.Input((LENGTH,), dtype="int32")
    tensor = Positions()(layers.Embedding(CHARACTERS, 64)(inputs))
    return _classifier(inputs, _encoder(tensor, 2, 64, True), CHARACTERS)


def _conv1d() -> keras.Model:
    inputs = tensor = keras.Input((28, 28))
    for filters in (32, 64):
        tensor = layers.Conv1D(filters, 5, padding="same", activation="relu")(tensor)
        tensor = layers.MaxPooling1D(2)(tensor)
    return _classifier(inputs, layers.Flatten()(tensor))


def _lstm() -> keras.Model:
    inputs = keras.Input((28, 28))
    return _classifier(inputs, layers.LSTM(64)(inputs))


def _unet() -> keras.Model:
    def double(tensor: Any, filters: int) -> Any:
        for _ in range(2):
            tensor = layers.Conv2D(filters, 3, padding="same", activation="relu")(tensor)
        return tensor

    inputs = keras.Input((28, 28, 1))
    first = double(inputs, 8)
    second = double(layers.MaxPooling2D()(first), 16)
    tensor = layers.Conv2DTranspose(8, 2, 2)(second)
    tensor = double(layers.Concatenate()([tensor, first]), 8)
    return _classifier(inputs, tensor, 2)


def _classifier(inputs: Any, tensor: Any, classes: int = 10) -> keras.Model:
    return keras.Model(inputs, layers.Dense(classes, "softmax")(tensor))


FAMILIES: dict[str, tuple[Callable[[], keras.Model], Callable[..., Any]]] = {
    "mobilenet-like": (_mobile, _images),
    "resnet, batch norm": (
        lambda: _residual(lambda: layers.BatchNormalization(momentum=0.9)),
        _images,
    ),
    "resnet, group norm": (lambda: _residual(lambda: layers.GroupNormalization(4)), _images),
    "vit": (_vit, _images),
    "conv1d": (_conv1d, _rows),
    "lstm": (_lstm, _rows),
    "u-net": (_unet, _pixels),
    "text transformer": (_text_transformer, _characters),
}
