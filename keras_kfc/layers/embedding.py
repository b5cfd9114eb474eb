"""The table of rows that records which ones were looked up."""

from typing import Any

import keras
import tensorflow as tf
from keras import ops

from keras_kfc._compat.keras_internals import mask_of, set_mask
from keras_kfc._compat.layer_hooks import table_of
from keras_kfc.layers.instrumented import KroneckerLayer, instruments
from keras_kfc.maps.dense import DenseMap
from keras_kfc.maps.embedding import EmbeddingMap
from keras_kfc.maps.weights import WeightMatrix
from keras_kfc.passes.masks import positions_of


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


@instruments(keras.layers.ReversibleEmbedding)
@keras.saving.register_keras_serializable(package="keras_kfc")
class ReversibleEmbedding(_Table, keras.layers.ReversibleEmbedding):
    """`keras.layers.ReversibleEmbedding`, which `keras_kfc.KFC` preconditions.

    The block of a table that is both looked up and the output projection is made of both uses.

    Example:

    >>> layer = keras_kfc.layers.ReversibleEmbedding(100, 4)
    >>> layer(layer(np.array([[1, 2, 3]])), reverse=True).shape
    TensorShape([1, 3, 100])
    """

    can_be_quantised = True

    @property
    def weight_matrices(self) -> tuple[WeightMatrix, ...]:
        """The table, and the kernel of the projection if that is another."""
        table = self.kronecker_kernel
        if self.tie_weights:
            return (WeightMatrix(table, None, self.linear_map, structure="tied"),)
        kernel = self.reverse_embeddings
        return (
            WeightMatrix(table, None, self.linear_map, "embeddings", self.curvature_structure),
            WeightMatrix(kernel, None, DenseMap(*kernel.shape), "reverse_embeddings"),
        )

    def call(self, inputs: Any, reverse: bool = False) -> Any:
        """Looks rows up, or multiplies by all of them, and records."""
        if not reverse:
            outputs = super().call(inputs)
            mask = mask_of(outputs)
            observed = self._observe_tokens(tf.convert_to_tensor(inputs), outputs)
            if mask is not None:
                set_mask(observed, mask)
            return observed
        kernel = ops.transpose(self.embeddings) if self.tie_weights else self.reverse_embeddings
        hidden = inputs
        if self.reverse_dtype is not None:
            hidden = ops.cast(hidden, self.reverse_dtype)
            kernel = ops.cast(kernel, self.reverse_dtype)
        logits = ops.matmul(hidden, kernel)
        logits = self._observe(hidden, logits, 0 if self.tie_weights else 1, positions_of(inputs))
        if self.logit_soft_cap is None:
            return logits
        return ops.tanh(logits / self.logit_soft_cap) * self.logit_soft_cap
