"""The Hessian of the loss in the model's outputs, as a linear operator.

In the notation of `keras_kfc.losses.likelihood` it is `H = Σ_e c_e R_e R_eᵀ`, positive
semi-definite, and the Fisher matrix of the whole network is `Jᵀ H J` with the Jacobian `J` of
the outputs. It is never written out: products with `R` are those of each loss's output model,
products with `Rᵀ` follow by differentiation, since `R z` is linear in z.
"""

from collections.abc import Sequence

import tensorflow as tf

from keras_kfc.linalg.precision import at_least_float32
from keras_kfc.losses.derivatives import log_notes
from keras_kfc.losses.families import family_of
from keras_kfc.losses.signs import random_signs
from keras_kfc.losses.terms import LossTerm


class OutputCurvature:
    """`H = S Sᵀ` of one batch, `S` with a block `R_e sqrt(c_e)` for each element.

    Args:
        terms: The model's loss terms, at least one.

    Attributes:
        sources: The output tensors that it acts on.
        notes: What the user should know of it, sentences without their subject.
        is_empirical: Whether the empirical Fisher matrix takes its place for some loss.
    """

    def __init__(self, terms: Sequence[LossTerm]):
        families = [family_of(term) for term in terms]
        self._models = [family.part for family in families]
        self.sources = [source for model in self._models for source in model.sources]
        self.notes = list(dict.fromkeys(family.note for family in families if family.note))
        self.is_empirical = any(family.is_empirical for family in families)
        examples = tf.shape(self.sources[0])[0]
        dtype = at_least_float32(self.sources[0]).dtype
        self._dtype = dtype
        # What output models return is scaled to be a mean over examples.
        self._per_example = 1 / tf.sqrt(tf.cast(tf.maximum(examples, 1), dtype))

    def log_notes(self) -> bool:
        """Logs the notes in one line; returns whether there were any."""
        return log_notes(self.notes, self.is_empirical)

    def root_shapes(self) -> list[tf.Tensor]:
        """Shapes of what `S` is multiplied with, one for each loss, examples first."""
        return [model.root_shape() for model in self._models]

    def root_times(self, vectors: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        """`S z`, a tensor for each source, of its shape and dtype.

        Args:
            vectors: A tensor for each loss, of the shapes `root_shapes()`.
        """
        products: list[tf.Tensor] = []
        for model, z in zip(self._models, vectors, strict=True):
            products += model.root_times(self._per_example * tf.cast(z, self._dtype))
        return products

    def transposed_root_times(self, tangents: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        """`Sᵀ u`, a tensor for each loss, of the shapes `root_shapes()`.

        Args:
            tangents: A tensor for each source, of its shape and dtype.
        """
        left = list(tangents)
        products = []
        for model in self._models:
            zeros = tf.zeros(model.root_shape(), self._dtype)
            own = [left.pop(0) for _ in model.sources]
            with tf.GradientTape() as tape:
                tape.watch(zeros)
                roots = model.root_times(self._per_example * zeros)
            product = tape.gradient(
                roots, zeros, output_gradients=own, unconnected_gradients="zero"
            )
            products.append(product)
        return products

    def times(self, tangents: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        """`H u`, a tensor for each source.

        Args:
            tangents: A tensor for each source.
        """
        return self.root_times(self.transposed_root_times(tangents))

    def size(self) -> tf.Tensor:
        """Number of columns of `S`, a scalar."""
        return tf.add_n([tf.reduce_prod(shape) for shape in self.root_shapes()])

    def column(self, number: tf.Tensor) -> list[tf.Tensor]:
        """One column of `S`, a tensor for each source; zeros beyond the last."""
        vectors, first = [], 0
        for shape in self.root_shapes():
            size = tf.reduce_prod(shape)
            vectors.append(tf.reshape(tf.one_hot(number - first, size, dtype=self._dtype), shape))
            first += size
        return self.root_times(vectors)

    def random_root(self, seed: tf.Tensor) -> list[tf.Tensor]:
        """`S z` for independent random signs z: its outer product is `H` in expectation.

        Args:
            seed: Two integers.
        """
        signs = []
        for number, shape in enumerate(self.root_shapes()):
            own = seed + tf.stack([tf.constant(number << 32, seed.dtype), tf.zeros((), seed.dtype)])
            signs.append(random_signs(shape, own, self._dtype))
        return self.root_times(signs)
