"""Diagonal output Hessians of Keras losses that serve training better than autodiff's.

Each is a function of targets and outputs of one shape, and gives `∂²ℓ_e / ∂o²`, or what
takes its place. n is the number of outputs that Keras averages over.

* Poisson: `1 / (n p)`, the expectation for targets drawn from the prediction, instead of
  `y / (n p²)`, which is zero for every count of zero.
* Kullback-Leibler divergence: `Σy / (Σp p)`, likewise. Through a softmax that is the Fisher
  matrix of the categorical cross-entropy.
* Huber: `min(1, δ/|r|) / n`, and log-cosh: `tanh(r) / (r n)`. These are the weights of
  iteratively reweighted least squares, a parabola that touches the loss and lies above
  it. The second derivative is smaller, and nothing for outliers, which would then have
  slopes but no curvature to hold their steps.
* Squared logarithmic error: `2 / ((1 + p)² n)`, the Gauss-Newton matrix in `log(1 + p)`;
  the second derivative is negative where p is far too large.
"""

import dataclasses
from collections.abc import Callable

import keras
import tensorflow as tf

from keras_kfc._compat.keras_internals import of_the_same_rank
from keras_kfc.linalg.precision import at_least_float32
from keras_kfc.losses.api import Family, LossKind, Options, register
from keras_kfc.losses.elements import ElementwiseView
from keras_kfc.losses.likelihood import x_log_x
from keras_kfc.losses.output_hessian import OutputHessian, closed_form_root, diagonal_root
from keras_kfc.losses.second_derivatives import unaligned
from keras_kfc.losses.terms import LossTerm

Curvature = Callable[..., tf.Tensor]


def _mean(curvature: tf.Tensor) -> tf.Tensor:
    return curvature / tf.cast(tf.shape(curvature)[-1], curvature.dtype)


def _poisson(y_true: tf.Tensor, y_pred: tf.Tensor) -> tf.Tensor:
    del y_true
    return _mean(tf.where(y_pred > 0, 1 / (y_pred + keras.config.epsilon()), 0))


def _squared_logarithm(y_true: tf.Tensor, y_pred: tf.Tensor) -> tf.Tensor:
    del y_true
    # Keras cuts predictions off there, and the loss is flat below.
    bends = y_pred > keras.config.epsilon()
    return _mean(tf.where(bends, 2 / tf.square(1 + tf.maximum(y_pred, 0)), 0))


def _divergence(y_true: tf.Tensor, y_pred: tf.Tensor) -> tf.Tensor:
    size = tf.reduce_sum(y_true, -1, keepdims=True)
    predicted = tf.reduce_sum(y_pred, -1, keepdims=True)
    curvature = tf.math.divide_no_nan(size, predicted * y_pred)
    # Likewise.
    return tf.where(y_pred > keras.config.epsilon(), curvature, 0)


def _huber(y_true: tf.Tensor, y_pred: tf.Tensor, delta: float = 1.0) -> tf.Tensor:
    delta = tf.cast(delta, y_pred.dtype)
    return _mean(delta / tf.maximum(tf.abs(y_pred - y_true), delta))


def _log_cosh(y_true: tf.Tensor, y_pred: tf.Tensor) -> tf.Tensor:
    error = y_pred - y_true
    small = tf.abs(error) < 1e-4
    one = tf.ones_like(error)
    error = tf.where(small, one, error)
    return _mean(tf.where(small, one, tf.tanh(error) / error))


def closed_form(
    term: LossTerm, curvature: Curvature, options: Options, dtype: tf.DType
) -> tf.Tensor | None:
    """The diagonal of the output Hessian by one of the functions above.

    Args:
        term: The loss term; `y_true` is needed.
        curvature: The function.
        options: Options of the loss.
        dtype: Type to compute in.

    Returns:
        A tensor of the shape of the outputs, or None where targets are of another shape.
    """
    outputs = tf.cast(term.y_pred, dtype)
    y_true, y_pred = of_the_same_rank(tf.cast(term.y_true, dtype), outputs)
    if list(y_true.shape) != list(y_pred.shape):
        return None
    return tf.reshape(curvature(y_true, y_pred, **options), tf.shape(outputs))


def _by(curvature: Curvature) -> Callable[[LossTerm, Options], Family]:
    def family(term: LossTerm, options: Options) -> Family:
        if term.y_true is None:
            term = dataclasses.replace(term, y_true=term.y_pred)
        view = ElementwiseView(term, None, False)
        if not view.aligned:
            return unaligned(term)
        diagonal = closed_form(term, curvature, options, at_least_float32(term.y_pred).dtype)
        root = diagonal_root(view) if diagonal is None else closed_form_root(view, diagonal)
        return Family(OutputHessian(view, root))

    return family


def _lowest_divergence(targets: tf.Tensor, options: Options) -> tf.Tensor:
    """Of targets of any size, by predictions of any size."""
    del options
    return x_log_x(tf.reduce_sum(targets, -1))


def _lowest_poisson(targets: tf.Tensor, options: Options) -> tf.Tensor:
    del options
    return tf.reduce_mean(targets - x_log_x(targets), -1)


register(
    keras.losses.poisson,
    LossKind(_by(_poisson), lowest=_lowest_poisson, needs_targets=False),
)
register(
    keras.losses.kl_divergence,
    LossKind(_by(_divergence), lowest=_lowest_divergence, needs_targets=False),
)
register(
    keras.losses.mean_squared_logarithmic_error,
    LossKind(_by(_squared_logarithm), needs_targets=False),
)
register(keras.losses.huber, LossKind(_by(_huber)))
register(keras.losses.log_cosh, LossKind(_by(_log_cosh)))
