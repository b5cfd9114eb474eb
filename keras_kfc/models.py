"""Keras's model classes, whose training passes feed the optimizer's factors.

A plain `keras.Model` with instrumented layers trains just the same: the first
training pass wraps its `compute_loss`. These classes override that method
instead, for models built from scratch.
"""

import keras
from keras.src.models.functional import Functional as KerasFunctional

from keras_kfc.capture import report_loss


class _ReportsLoss:
    """Tells the capture of the current training pass what the loss was computed from."""

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        """Computes the loss as Keras does, and reports it."""
        loss = super().compute_loss(  # type: ignore[misc]
            x=x, y=y, y_pred=y_pred, sample_weight=sample_weight, training=training
        )
        report_loss(self, y, y_pred, sample_weight, loss)
        return loss

    compute_loss.reports_loss = True  # type: ignore[attr-defined]


@keras.saving.register_keras_serializable(package="keras_kfc")
class Sequential(_ReportsLoss, keras.Sequential):
    """`keras.Sequential`, ready for `keras_kfc.KFC`.

    Example:

    >>> model = keras_kfc.Sequential([keras_kfc.layers.Dense(3, activation="softmax")])
    >>> model.compile(optimizer=keras_kfc.KFC(), loss="sparse_categorical_crossentropy")
    >>> history = model.fit(np.eye(6, 4), np.arange(6) % 3, epochs=2, verbose=0)
    """


@keras.saving.register_keras_serializable(package="keras_kfc")
class Model(_ReportsLoss, keras.Model):
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
