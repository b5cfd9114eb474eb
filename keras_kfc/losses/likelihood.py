"""Losses that are the negative logarithm of a likelihood: targets can be drawn from the outputs.

The Fisher matrix is defined as the generalised Gauss-Newton matrix (GGN) of
the Keras loss as compiled, `L = Σ_e c_e ℓ_e` in the notation of
`keras_kfc.losses.terms`. With `R_e R_eᵀ` the Hessian of `ℓ_e` in the outputs, its GGN
is `Σ_e c_e J_eᵀ R_e R_eᵀ J_e`, which is the mean over B examples of `g gᵀ` for
the gradients `g` that start the backward pass from

    sqrt(B c_e) R_e z,      z with zero mean and unit covariance (sampled)
    sqrt(B c_e) R_e[:, k],  one backward pass for each k and summed (exact).

Drawing targets from the prediction is such a `z`: `R_e z` is the derivative of
the negative log-likelihood of the drawn target. Independent random signs are another
(curvature propagation). Source: Martens & Grosse (2015), section 5; Martens, Sutskever &
Swersky (2012) for signs; Dangel et al. (2025).

Tensors: B examples, P positions, D output channels or classes.
"""

import abc

import tensorflow as tf

from keras_kfc._compat.keras_internals import logits_of, mask_of
from keras_kfc.linalg.precision import at_least_float32
from keras_kfc.losses.terms import LossTerm, root_coefficients


class Likelihood(abc.ABC):
    """The predictive distribution that belongs to one loss term.

    Args:
        term: The loss term.
        axis: Axis of classes, or of the channels the loss averages over.
        from_logits: Whether `y_pred` holds logits.
        ignore_class: Class whose elements do not count, or None.

    Attributes:
        sources: Tensors to start the backward pass from (one tensor).
    """

    # Whether the loss is a mean over the channel axis.
    averages = True
    # Whether the loss uses the logits that Keras's activations attach to outputs.
    uses_logits = True

    def __init__(
        self,
        term: LossTerm,
        axis: int = -1,
        from_logits: bool = False,
        ignore_class: int | None = None,
    ):
        outputs = term.y_pred
        # No division by small probabilities.
        logits = logits_of(outputs) if self.uses_logits else None
        if logits is not None:
            outputs, from_logits = logits, True
        self.sources = [outputs]
        self.from_logits = from_logits
        rank = outputs.shape.rank
        self._axis = axis % rank
        self._rank = rank
        # Everything below is computed with the channel axis last.
        self.outputs = self._move_axis(at_least_float32(outputs), forward=True)
        self._scale = self._element_scale(term, ignore_class, tf.shape(outputs)[0])

    @abc.abstractmethod
    def draw(self, seed: tf.Tensor) -> tf.Tensor:
        """`R z` of each element for one draw of targets, of the shape of `outputs`.

        Args:
            seed: Two integers, as for `tf.random.stateless_uniform`.
        """

    @abc.abstractmethod
    def times_root(self, z: tf.Tensor) -> tf.Tensor:
        """`R z` of each element, linear in z.

        Args:
            z: Of the shape of `outputs`, `(B, ..., D)`.
        """

    def sample(self, seed: tf.Tensor) -> list[tf.Tensor]:
        """Derivatives for one draw of targets from the prediction.

        Args:
            seed: Two integers.

        Returns:
            A tensor for each of `sources`, of its shape and dtype.
        """
        return self._finish(self.draw(seed))

    def root_shape(self) -> tf.Tensor:
        """Shape of what R is multiplied with, that of `outputs`."""
        return tf.shape(self.outputs)

    def root_times(self, z: tf.Tensor) -> list[tf.Tensor]:
        """Derivatives `R z`, as `sample` returns them."""
        return self._finish(self.times_root(tf.cast(z, self.outputs.dtype)))

    def count_columns(self) -> tf.Tensor:
        """Number of columns of R for one example, P * D."""
        return tf.reduce_prod(tf.shape(self.outputs)[1:])

    def column(self, index: tf.Tensor) -> list[tf.Tensor]:
        """Derivatives for column `index` of R, as `sample` returns them."""
        shape = tf.shape(self.outputs)
        chosen = tf.one_hot(index, tf.reduce_prod(shape[1:]), dtype=self.outputs.dtype)
        chosen = tf.reshape(chosen, tf.concat(([1], shape[1:]), axis=0))
        return self._finish(self.times_root(tf.broadcast_to(chosen, shape)))

    def _move_axis(self, tensor: tf.Tensor, forward: bool) -> tf.Tensor:
        if self._axis == self._rank - 1:
            return tensor
        order = [i for i in range(self._rank) if i != self._axis] + [self._axis]
        if not forward:
            order = [order.index(i) for i in range(self._rank)]
        return tf.transpose(tensor, order)

    def _element_scale(
        self, term: LossTerm, ignore_class: int | None, examples: tf.Tensor
    ) -> tf.Tensor:
        """`sqrt(B c_e)` with a last axis of size 1, D included where Keras averages over it."""
        mask = mask_of(term.y_pred)
        if ignore_class is not None:
            if term.y_true is None:
                raise ValueError(
                    "A loss with `ignore_class` needs targets to know which positions count. "
                    f"Received: ignore_class={ignore_class}, y=None"
                )
            labels = tf.reshape(term.y_true, tf.shape(self.outputs)[:-1])
            valid = labels != tf.cast(ignore_class, labels.dtype)
            mask = valid if mask is None else mask & valid
        roots = root_coefficients(term, self._loss_values(term), mask, examples)
        if roots.shape.rank < self.outputs.shape.rank - 1:
            # Keras squeezed a channel axis of size 1 away and averaged over the
            # axis before it: spread the coefficient over that axis.
            size = tf.sqrt(tf.cast(tf.shape(self.outputs)[-2], roots.dtype))
            roots = tf.repeat(roots[..., None] / size, tf.shape(self.outputs)[-2], axis=-1)
        roots = roots[..., None]
        if self.averages:
            roots /= tf.sqrt(tf.cast(tf.shape(self.outputs)[-1], roots.dtype))
        return tf.cast(roots, self.outputs.dtype)

    def _loss_values(self, term: LossTerm) -> tf.Tensor:
        """A tensor of the shape of the values that the loss function returns."""
        outputs = self.outputs
        if self.averages and term.y_true is not None:
            rank = len(term.y_true.shape)
            if rank == outputs.shape.rank - 1 and outputs.shape[-1] == 1 and rank > 1:
                return outputs[..., 0, 0]
        return outputs[..., 0]

    def _finish(self, derivative: tf.Tensor) -> list[tf.Tensor]:
        scaled = self._move_axis(derivative * self._scale, forward=False)
        source = self.sources[0]
        return [tf.cast(scaled, source.dtype)]


def uniform(shape: tf.Tensor, seed: tf.Tensor, dtype: tf.DType) -> tf.Tensor:
    """Random numbers in [0, 1) that follow from a seed alone."""
    return tf.random.stateless_uniform(shape, seed, dtype=dtype, alg="philox")


def x_log_x(x: tf.Tensor) -> tf.Tensor:
    """`x log x`, 0 at 0."""
    return tf.math.xlogy(x, x)
