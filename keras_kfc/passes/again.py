"""The loss of a batch once more, after the weights have changed.

Keras hands the data of a train step to the model's `compute_loss`, a method that users may
override. Here it is noted on its way, with the model's own method to call again.
"""

from collections.abc import Callable
from typing import Any

import tensorflow as tf

from keras_kfc._compat.keras_internals import takes_training
from keras_kfc.linalg.precision import at_least_float32


def loss_again(
    model: Any, compute_loss: Callable[..., tf.Tensor], data: dict[str, Any]
) -> Callable[[], tf.Tensor]:
    """A function that computes the loss of a train step's batch at the weights of the moment.

    It draws the same random numbers each time, and leaves no trace: what a forward pass changes
    (averages of a batch normalisation, states of random numbers, metrics) is put back.

    Args:
        model: The model.
        compute_loss: Its `compute_loss`.
        data: What Keras called it with: `x`, `y`, `sample_weight`.
    """

    def evaluate() -> tf.Tensor:
        variables = [*model.non_trainable_variables, *model.metrics_variables]
        before = [tf.identity(variable.value) for variable in variables]
        x = data["x"]
        outputs = model(x, training=True) if takes_training(model) else model(x)
        loss = compute_loss(
            x=x,
            y=data["y"],
            y_pred=outputs,
            sample_weight=data["sample_weight"],
            training=True,
        )
        loss = tf.reduce_sum(at_least_float32(loss))
        for variable, value in zip(variables, before, strict=True):
            variable.assign(value)
        return loss

    return evaluate


def watch_data(model: Any, note: Callable[[Callable[[], tf.Tensor]], None]) -> None:
    """Makes a model's `compute_loss` tell how to compute the loss of its batch again.

    The wrapper stands on the instance, beside those of its class, until `unwatch_data`.

    Args:
        model: A compiled `keras.Model`.
        note: What is called with the function, before the loss is computed.
    """
    if "compute_loss" in vars(model):
        return
    original = model.compute_loss

    def compute_loss(
        x: Any = None,
        y: Any = None,
        y_pred: Any = None,
        sample_weight: Any = None,
        training: Any = True,
    ) -> Any:
        data = {"x": x, "y": y, "sample_weight": sample_weight}
        if training and x is not None:
            note(loss_again(model, original, data))
        return original(x=x, y=y, y_pred=y_pred, sample_weight=sample_weight, training=training)

    vars(model)["compute_loss"] = compute_loss


def unwatch_data(model: Any) -> None:
    """Undoes `watch_data`."""
    vars(model).pop("compute_loss", None)
