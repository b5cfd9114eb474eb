"""Keras's model classes under this package's name, for models built from scratch.

A plain `keras.Model` with instrumented layers trains just the same: its first
training pass does what these classes do when they are compiled.
"""

import keras
from keras.src.models.functional import Functional as KerasFunctional

from keras_kfc.capture import watch_loss


class _WatchesLoss:
    """Lets the compiled loss feed the factors of the optimizer."""

    def compile(self, *args, **kwargs):
        """Compiles as Keras does."""
        super().compile(*args, **kwargs)  # type: ignore[misc]
        watch_loss(self)


@keras.saving.register_keras_serializable(package="keras_kfc")
class Sequential(_WatchesLoss, keras.Sequential):
    """`keras.Sequential`, ready for `keras_kfc.KFC`.

    Example:

    >>> model = keras_kfc.Sequential([keras_kfc.layers.Dense(3, activation="softmax")])
    >>> model.compile(optimizer=keras_kfc.KFC(), loss="sparse_categorical_crossentropy")
    >>> history = model.fit(np.eye(6, 4), np.arange(6) % 3, epochs=2, verbose=0)
    """


@keras.saving.register_keras_serializable(package="keras_kfc")
class Model(_WatchesLoss, keras.Model):
    """`keras.Model`, ready for `keras_kfc.KFC`.

    Subclass it, or pass inputs and outputs to get a `keras_kfc.Functional`.

    Example:

    >>> inputs = keras.Input((4,))
    >>> outputs = keras_kfc.layers.Dense(2)(inputs)
    >>> type(keras_kfc.Model(inputs, outputs)).__name__
    'Functional'
    """

    def __new__(cls, *args, **kwargs):
        """Makes a `Functional` of inputs and outputs, as `keras.Model` does."""
        if cls is Model and (len(args) + len({"inputs", "outputs"} & set(kwargs))) >= 2:
            return Functional.__new__(Functional, *args, **kwargs)
        return super().__new__(cls)


@keras.saving.register_keras_serializable(package="keras_kfc")
class Functional(Model, KerasFunctional):
    """A functional Keras model, ready for `keras_kfc.KFC`."""

    def __new__(cls, *args, **kwargs):
        """Makes an uninitialised model."""
        return KerasFunctional.__new__(cls)
