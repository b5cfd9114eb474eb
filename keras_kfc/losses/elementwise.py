"""Losses of Keras whose second derivatives automatic differentiation finds well enough."""

import keras
import tensorflow as tf

from keras_kfc.losses.api import LossKind, Options, register
from keras_kfc.losses.second_derivatives import by_block, by_diagonal, empirical


def _lowest_cosine(targets: tf.Tensor, options: Options) -> tf.Tensor:
    return keras.losses.cosine_similarity(targets, targets, **options)


# Sums or means over an axis of functions of one output each.
for _function in (
    keras.losses.mean_absolute_error,
    keras.losses.mean_absolute_percentage_error,
    keras.losses.hinge,
    keras.losses.squared_hinge,
):
    register(_function, LossKind(by_diagonal()))
register(
    keras.losses.binary_focal_crossentropy, LossKind(by_diagonal(in_logits=True), has_lowest=False)
)
# Functions of one element's outputs.
register(keras.losses.categorical_hinge, LossKind(by_block()))
register(keras.losses.categorical_generalized_cross_entropy, LossKind(by_block(in_logits=True)))
register(
    keras.losses.categorical_focal_crossentropy,
    LossKind(by_block(in_logits=True), has_lowest=False),
)
register(keras.losses.cosine_similarity, LossKind(by_block(), lowest=_lowest_cosine))
register(keras.losses.dice, LossKind(by_block(), has_lowest=False))
register(keras.losses.tversky, LossKind(by_block(), has_lowest=False))
# Values of one example that depend on all examples, or on too many outputs.
for _function in (keras.losses.circle, keras.losses.ctc):
    register(
        _function,
        LossKind(
            lambda term, options: empirical(term, "has values that depend on many outputs at once"),
            has_lowest=False,
        ),
    )
