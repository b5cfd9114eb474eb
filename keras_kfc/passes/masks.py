"""Which positions of a layer's input count."""

from typing import Any

import tensorflow as tf

from keras_kfc._compat.keras_internals import mask_of


def positions_of(inputs: Any) -> tf.Tensor | None:
    """Keras's mask of a layer's input, if it tells which positions count."""
    mask = mask_of(inputs)
    if mask is None or mask.shape.rank is None or inputs.shape.rank is None:
        return None
    positions = inputs.shape[: mask.shape.rank]
    fits = mask.shape.rank < inputs.shape.rank and positions.is_compatible_with(mask.shape)
    return tf.cast(mask, tf.bool) if fits else None
