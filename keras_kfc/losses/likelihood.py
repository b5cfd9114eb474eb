"""Output derivatives that make up the Fisher matrix, from a compiled Keras loss.

The Fisher matrix is defined as the generalised Gauss-Newton matrix (GGN) of
the Keras loss as compiled, `L = Σ_e c_e ℓ_e` in the notation of
`keras_kfc.losses.terms`. With `R_e R_eᵀ` the Hessian of `ℓ_e` in the outputs, its GGN
is `Σ_e c_e J_eᵀ R_e R_eᵀ J_e`, which is the mean over B examples of `g gᵀ` for
the gradients `g` that start the backward pass from

    sqrt(B c_e) R_e z,      z with zero mean and unit covariance (sampled)
    sqrt(B c_e) R_e[:, k],  one backward pass for each k and summed (exact).

Drawing targets from the prediction is such a `z`: `R_e z` is the derivative of
the negative log-likelihood of the drawn target. Source: Martens & Grosse
(2015), section 5; Dangel et al. (2025).

Tensors: B examples, P positions, D output channels or classes.
"""

import keras
import tensorflow as tf

from keras_kfc._compat.keras_internals import logits_of, mask_of
from keras_kfc.linalg.precision import at_least_float32
from keras_kfc.losses.terms import LossTerm, known_function, root_coefficients


class OutputDistribution:
    """The predictive distribution that belongs to one loss term.

    Args:
        term: The loss term; its loss is one that `distribution_of` knows.
        family: `"categorical"`, `"bernoulli"` or `"gaussian"`.
        axis: Axis of classes, or of the channels the loss averages over.
        from_logits: Whether `y_pred` holds logits.
        ignore_class: Class whose elements do not count, or None.

    Attributes:
        sources: Tensors to start the backward pass from (one tensor).
    """

    def __init__(
        self,
        term: LossTerm,
        family: str,
        axis: int,
        from_logits: bool,
        ignore_class: int | None = None,
    ):
        outputs = term.y_pred
        # Keras's activations attach the logits, and its losses then use them:
        # no division by small probabilities.
        logits = None if family == "gaussian" else logits_of(outputs)
        if logits is not None:
            outputs, from_logits = logits, True
        self.sources = [outputs]
        self._family = family
        self._from_logits = from_logits
        rank = outputs.shape.rank
        self._axis = axis % rank
        self._rank = rank
        self._shape = tf.shape(outputs)
        # Everything below is computed with the channel axis last.
        self._outputs = self._move_axis(at_least_float32(outputs), forward=True)
        self._scale = self._element_scale(term, ignore_class)

    def _move_axis(self, tensor: tf.Tensor, forward: bool) -> tf.Tensor:
        if self._axis == self._rank - 1:
            return tensor
        order = [i for i in range(self._rank) if i != self._axis] + [self._axis]
        if not forward:
            order = [order.index(i) for i in range(self._rank)]
        return tf.transpose(tensor, order)

    def _element_scale(self, term, ignore_class):
        """`sqrt(B c_e)` with a last axis of size 1, D included where Keras averages over it."""
        mask = mask_of(term.y_pred)
        if ignore_class is not None:
            if term.y_true is None:
                raise ValueError(
                    "A loss with `ignore_class` needs targets to know which positions count. "
                    f"Received: ignore_class={ignore_class}, y=None"
                )
            labels = tf.reshape(term.y_true, tf.shape(self._outputs)[:-1])
            valid = labels != tf.cast(ignore_class, labels.dtype)
            mask = valid if mask is None else mask & valid
        roots = root_coefficients(term, self._loss_values(term), mask, self._shape[0])
        if roots.shape.rank < self._outputs.shape.rank - 1:
            # Keras squeezed a channel axis of size 1 away and averaged over the
            # axis before it: spread the coefficient over that axis.
            size = tf.sqrt(tf.cast(tf.shape(self._outputs)[-2], roots.dtype))
            roots = tf.repeat(roots[..., None] / size, tf.shape(self._outputs)[-2], axis=-1)
        roots = roots[..., None]
        if self._family != "categorical":
            roots /= tf.sqrt(tf.cast(tf.shape(self._outputs)[-1], roots.dtype))
        return tf.cast(roots, self._outputs.dtype)

    def _loss_values(self, term):
        """A tensor of the shape of the values that the loss function returns."""
        outputs = self._outputs
        if self._family != "categorical" and term.y_true is not None:
            rank = len(term.y_true.shape)
            if rank == outputs.shape.rank - 1 and outputs.shape[-1] == 1 and rank > 1:
                return outputs[..., 0, 0]
        return outputs[..., 0]

    def sample(self, seed: tf.Tensor) -> list[tf.Tensor]:
        """Derivatives for one draw of targets from the prediction.

        Args:
            seed: Two integers, as for `tf.random.stateless_uniform`.

        Returns:
            A tensor for each of `sources`, of its shape and dtype.
        """
        if self._family == "gaussian":
            noise = tf.random.stateless_normal(
                tf.shape(self._outputs), seed, dtype=self._outputs.dtype, alg="philox"
            )
            return self._finish(2.0**0.5 * noise)
        probabilities = self._probabilities()
        if self._family == "bernoulli":
            uniform = _uniform(tf.shape(probabilities), seed, probabilities.dtype)
            return self._finish(self._bernoulli_derivative(uniform < probabilities))
        total = tf.cumsum(probabilities, axis=-1)
        uniform = _uniform(tf.shape(probabilities)[:-1], seed, probabilities.dtype)
        draws = tf.reduce_sum(tf.cast(total <= uniform[..., None] * total[..., -1:], tf.int32), -1)
        classes = tf.shape(probabilities)[-1]
        target = tf.one_hot(tf.minimum(draws, classes - 1), classes, dtype=probabilities.dtype)
        return self._finish(self._categorical_derivative(probabilities, target))

    def count_columns(self) -> tf.Tensor:
        """Number of columns of R for one example, P * D."""
        return tf.reduce_prod(tf.shape(self._outputs)[1:])

    def column(self, index: tf.Tensor) -> list[tf.Tensor]:
        """Derivatives for column `index` of R, as `sample` returns them."""
        shape = tf.shape(self._outputs)
        chosen = tf.one_hot(index, tf.reduce_prod(shape[1:]), dtype=self._outputs.dtype)
        chosen = tf.reshape(chosen, tf.concat(([1], shape[1:]), axis=0))
        if self._family == "gaussian":
            return self._finish(2.0**0.5 * chosen * tf.ones_like(self._outputs))
        probabilities = self._probabilities()
        if self._family == "bernoulli":
            # The variance of the drawn target, p (1 - p), on the diagonal.
            if self._from_logits:
                return self._finish(chosen * tf.sqrt(probabilities * (1 - probabilities)))
            deviation = tf.sqrt(probabilities * (1 - probabilities))
            return self._finish(chosen * tf.math.divide_no_nan(1.0, deviation))
        here = tf.reduce_sum(chosen, axis=-1, keepdims=True)
        probability = tf.reduce_sum(chosen * probabilities, axis=-1, keepdims=True)
        derivative = self._categorical_derivative(probabilities, chosen) * here
        return self._finish(tf.sqrt(probability) * derivative)

    def _probabilities(self) -> tf.Tensor:
        if self._family == "bernoulli":
            return tf.sigmoid(self._outputs) if self._from_logits else self._outputs
        if self._from_logits:
            return tf.nn.softmax(self._outputs)
        # Keras normalises what it is given.
        total = tf.reduce_sum(self._outputs, axis=-1, keepdims=True)
        return tf.math.divide_no_nan(self._outputs, total)

    def _bernoulli_derivative(self, positive: tf.Tensor) -> tf.Tensor:
        probabilities = self._probabilities()
        if self._from_logits:
            return probabilities - tf.cast(positive, probabilities.dtype)
        return tf.where(
            positive,
            -tf.math.divide_no_nan(1.0, probabilities),
            tf.math.divide_no_nan(1.0, 1.0 - probabilities),
        )

    def _categorical_derivative(self, probabilities: tf.Tensor, target: tf.Tensor) -> tf.Tensor:
        if self._from_logits:
            return probabilities - target
        total = tf.reduce_sum(self._outputs, axis=-1, keepdims=True)
        return tf.math.divide_no_nan(1.0, total) - tf.math.divide_no_nan(target, self._outputs)

    def _finish(self, derivative: tf.Tensor) -> list[tf.Tensor]:
        scaled = self._move_axis(derivative * self._scale, forward=False)
        source = self.sources[0]
        return [tf.cast(scaled, source.dtype)]


def distribution_of(term: LossTerm) -> OutputDistribution | None:
    """The predictive distribution behind a Keras loss.

    Args:
        term: The loss term.

    Returns:
        An `OutputDistribution`, or None for a loss that is none of those known here.
    """
    function, options = known_function(term.loss)
    axis = options.get("axis", -1)
    from_logits = bool(options.get("from_logits", False))
    if function is keras.losses.mean_squared_error:
        return OutputDistribution(term, "gaussian", -1, True)
    if function is keras.losses.binary_crossentropy:
        return OutputDistribution(term, "bernoulli", axis, from_logits)
    if function is keras.losses.categorical_crossentropy:
        return OutputDistribution(term, "categorical", axis, from_logits)
    if function is keras.losses.sparse_categorical_crossentropy:
        return OutputDistribution(
            term, "categorical", axis, from_logits, options.get("ignore_class")
        )
    return None


def _uniform(shape, seed, dtype):
    return tf.random.stateless_uniform(shape, seed, dtype=dtype, alg="philox")
