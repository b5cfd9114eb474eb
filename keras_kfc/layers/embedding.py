"""The table of rows that records which ones were looked up."""

from typing import Any

import keras
import tensorflow as tf

from keras_kfc._compat.layer_hooks import table_of
from keras_kfc.layers.instrumented import KroneckerLayer, instruments
from keras_kfc.maps.embedding import EmbeddingMap


class _Table(KroneckerLayer):
    """What tables of rows share."""

    curvature_structure = "diagonal_input"
    bias = None

    _embeddings: Any
    mask_zero: bool

    @property
    def kronecker_kernel(self) -> keras.Variable:
        """The table itself, whatever `layer.embeddings` derives from it."""
        return table_of(self)

    @property
    def linear_map(self) -> EmbeddingMap:
        """The layer's `EmbeddingMap`."""
        return EmbeddingMap(*self.kronecker_kernel.shape)

    def _observe_tokens(self, inputs: Any, outputs: tf.Tensor) -> tf.Tensor:
        """Shows an open capture which rows were looked up."""
        tokens = tf.cast(inputs, "int32") if not inputs.dtype.is_integer else inputs
        return self._observe(lambda: tokens, outputs, mask=tokens != 0 if self.mask_zero else None)


@instruments(keras.layers.Embedding)
@keras.saving.register_keras_serializable(package="keras_kfc")
class Embedding(_Table, keras.layers.Embedding):
    """`keras.layers.Embedding`, which `keras_kfc.KFC` preconditions.

    Only the rows that a batch uses are moved.

    Example:

    >>> layer = keras_kfc.layers.Embedding(100, 4)
    >>> layer(np.array([[1, 2, 3]])).shape
    TensorShape([1, 3, 4])
    """

    can_be_quantised = True

    def call(self, inputs: Any) -> tf.Tensor:
        """Looks rows up, and records which."""
        outputs = super().call(inputs)
        return self._observe_tokens(tf.convert_to_tensor(inputs), outputs)
