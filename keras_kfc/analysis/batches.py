"""What the analyses of a model on given data share: its loss, its data, and batches of them."""

import random
from collections.abc import Callable, Iterator
from typing import Any

import keras
import tensorflow as tf

from keras_kfc._compat.keras_internals import compile_loss, compiled_loss_of, takes_training
from keras_kfc.utils.arguments import check_positive_integer, check_seed


class Batches:
    """A model with its loss and data, in batches.

    Args:
        model: The model; it is built if it is not.
        x: Inputs, in the structure that the model takes, first axis examples.
        y: Targets, or None.
        loss: The loss, as `keras.Model.compile` takes it, or None for the compiled one.
        batch_size: Number of examples to run at a time.

    Attributes:
        examples: Number of examples.
        compiled: Keras's `CompileLoss`.

    Raises:
        TypeError: If `model` is not a Keras model, or `x` or `y` hold something else than arrays.
        ValueError: If no loss is known, or arrays differ in length.
    """

    def __init__(self, model: keras.Model, x: Any, y: Any, loss: Any, batch_size: int):
        if not isinstance(model, keras.Model):
            raise TypeError(
                "Argument `model` must be a `keras.Model`. "
                f"Received: model={model!r} of type {type(model).__name__}"
            )
        self.model = model
        self.examples = length_of("x", x)
        if y is not None and length_of("y", y) != self.examples:
            raise ValueError(
                f"Argument `y` must have as many examples as `x`, {self.examples}. "
                f"Received: {length_of('y', y)}"
            )
        self.batch_size = check_positive_integer("batch_size", batch_size)
        self.compiled = loss_of(model, loss)
        self._x, self._y = x, y
        if not model.built:
            self.call(_slice(x, 0, 1))

    def call(self, inputs: Any) -> Any:
        """The model's outputs in inference mode."""
        return call_model(self.model, inputs)

    def function(self, call: Callable[..., Any], jit_compile: bool = False) -> Callable[..., Any]:
        """A graph function, unless the model is to run eagerly.

        Args:
            call: What it computes.
            jit_compile: Whether XLA compiles it.
        """
        if getattr(self.model, "run_eagerly", False):
            return call
        function: Callable[..., Any] = tf.function(
            call, autograph=False, reduce_retracing=True, jit_compile=jit_compile or None
        )
        return function

    def __iter__(self) -> Iterator[tuple[int, int, Any, Any]]:
        """Number of the first example of each batch, number of examples, inputs, targets."""
        for start in range(0, self.examples, self.batch_size):
            stop = min(start + self.batch_size, self.examples)
            targets = None if self._y is None else _slice(self._y, start, stop)
            yield start, stop - start, _slice(self._x, start, stop), targets


def call_model(model: keras.Model, inputs: Any) -> Any:
    """A model's outputs in inference mode."""
    return model(inputs, training=False) if takes_training(model) else model(inputs)


def drawn_seed(seed: int | None) -> int:
    """A given seed, checked, or a random one."""
    seed = check_seed(seed)
    return random.randrange(2**31) if seed is None else seed


def length_of(name: str, data: Any) -> int:
    """Number of examples in a structure of arrays.

    Raises:
        TypeError: If it holds something else.
        ValueError: If arrays differ in length.
    """
    lengths = set()
    for part in keras.tree.flatten(data):
        if not getattr(part, "shape", None):
            raise TypeError(
                f"Argument `{name}` must be an array with examples along its first axis, or a "
                f"structure of such arrays. Received: {name}={data!r} of type "
                f"{type(data).__name__}"
            )
        lengths.add(int(part.shape[0]))
    if len(lengths) != 1 or 0 in lengths:
        raise ValueError(
            f"Arrays in argument `{name}` must be of one length, at least 1. Received: "
            f"lengths {sorted(lengths)}"
        )
    return lengths.pop()


def loss_of(model: keras.Model, loss: Any) -> Any:
    """Keras's `CompileLoss` of a given loss, or the compiled one.

    Raises:
        ValueError: If there is neither.
    """
    if loss is not None:
        return compile_loss(loss, model)
    compiled = compiled_loss_of(model)
    if compiled is None:
        raise ValueError(
            "Argument `loss` is needed for a model that was not compiled with a loss. "
            "Received: loss=None"
        )
    return compiled


def _slice(structure: Any, start: int, stop: int) -> Any:
    return keras.tree.map_structure(lambda part: tf.convert_to_tensor(part[start:stop]), structure)
