"""Output derivatives that make up the Fisher matrix, from a compiled Keras loss.

The Fisher matrix is defined as the generalised Gauss-Newton matrix (GGN) of
the Keras loss as compiled. A Keras loss is a sum over *elements* (an example,
or one position of an example), `L = Σ_e c_e ℓ_e`, where `ℓ_e` is what the
loss function returns and the coefficients `c_e` come from the reduction,
sample weights, class weights, masks and loss weights. With `R_e R_eᵀ` the
Hessian of `ℓ_e` in the outputs, its GGN is `Σ_e c_e J_eᵀ R_e R_eᵀ J_e`, which
is the mean over B examples of `g gᵀ` for the gradients `g` that start the
backward pass from

    sqrt(B c_e) R_e z,      z with zero mean and unit covariance (sampled)
    sqrt(B c_e) R_e[:, k],  one backward pass for each k and summed (exact).

Drawing targets from the prediction is such a `z`: `R_e z` is the derivative of
the negative log-likelihood of the drawn target. Source: Martens & Grosse
(2015), section 5; Dangel et al. (2025).

Tensors: B examples, P positions, D output channels or classes.
"""

import dataclasses
from collections.abc import Callable, Sequence

import keras
import tensorflow as tf

from keras_kfc.patches import at_least_float32

FISHERS = ("sampled", "empirical", "exact")


@dataclasses.dataclass
class LossTerm:
    """One loss of a compiled model, with the output it applies to.

    Args:
        loss: The `keras.losses.Loss`.
        y_true: Targets, or None where they are not known.
        y_pred: The model's output.
        sample_weight: Sample weights as Keras passes them on, or None.
        loss_weight: Loss weight, or None.
    """

    loss: keras.losses.Loss
    y_true: tf.Tensor | None
    y_pred: tf.Tensor
    sample_weight: tf.Tensor | None = None
    loss_weight: float | None = None


class _Reduction(keras.losses.Loss):
    """Keras's own reduction of given loss values, to read coefficients off."""

    def call(self, y_true, y_pred):
        del y_true
        return y_pred


def element_coefficients(
    term: LossTerm, values: tf.Tensor, mask: tf.Tensor | None
) -> tf.Tensor:
    """Coefficients `c_e` of the loss values in the total loss.

    They are the derivative of Keras's own reduction with respect to the values.

    Args:
        term: The loss term.
        values: A tensor of the shape of the loss values, one for each element.
        mask: Mask of the elements, or None.

    Returns:
        A tensor of the shape of `values`; negative weights count as zero.
    """
    reduction = _Reduction("reduction", term.loss.reduction, values.dtype.name)
    with tf.GradientTape() as tape:
        tape.watch(values)
        entries = tf.identity(values)
        if mask is not None:
            entries._keras_mask = mask
        total = tf.reduce_sum(reduction(entries, entries, sample_weight=term.sample_weight))
    coefficients = tape.gradient(total, values)
    # Keras divides the loss by the number of replicas, which average again.
    coefficients *= tf.distribute.get_strategy().num_replicas_in_sync
    if term.loss_weight is not None:
        coefficients *= tf.cast(term.loss_weight, coefficients.dtype)
    return tf.maximum(coefficients, 0)


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
        logits = None if family == "gaussian" else getattr(outputs, "_keras_logits", None)
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
        mask = getattr(term.y_pred, "_keras_mask", None)
        if ignore_class is not None:
            if term.y_true is None:
                raise ValueError(
                    "A loss with `ignore_class` needs targets to know which positions count. "
                    f"Received: ignore_class={ignore_class}, y=None"
                )
            labels = tf.reshape(term.y_true, tf.shape(self._outputs)[:-1])
            valid = labels != tf.cast(ignore_class, labels.dtype)
            mask = valid if mask is None else mask & valid
        coefficients = element_coefficients(
            term, tf.zeros_like(self._loss_values(term)), mask
        )
        if coefficients.shape.rank < self._outputs.shape.rank - 1:
            # Keras squeezed a channel axis of size 1 away and averaged over the
            # axis before it: spread the coefficient over that axis.
            size = tf.cast(tf.shape(self._outputs)[-2], coefficients.dtype)
            coefficients = tf.repeat(
                coefficients[..., None] / size, tf.shape(self._outputs)[-2], axis=-1
            )
        examples = tf.cast(self._shape[0], coefficients.dtype)
        squared = examples * coefficients[..., None]
        if self._family != "categorical":
            channels = tf.cast(tf.shape(self._outputs)[-1], coefficients.dtype)
            squared /= channels
        return tf.cast(tf.sqrt(squared), self._outputs.dtype)

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


class EmpiricalDerivatives:
    """Output derivatives of the loss at the training targets (empirical Fisher).

    Works for every `keras.losses.Loss`. One example's derivative is scaled by
    `1 / sqrt(w)`, w being its weight in the mean, so that weights enter as
    they do in the Fisher matrix.

    Args:
        term: The loss term; `y_true` is needed.

    Attributes:
        sources: Tensors to start the backward pass from.
    """

    def __init__(self, term: LossTerm):
        outputs = term.y_pred
        logits = getattr(outputs, "_keras_logits", None)
        self.sources = [outputs] if logits is None else [outputs, logits]
        self._term = term

    def derivatives(self) -> list[tf.Tensor]:
        """Derivatives for each of `sources`, of their shapes and dtypes."""
        term = self._term
        outputs = tf.identity(self.sources[0])
        watched = [outputs]
        if len(self.sources) == 2:
            watched.append(tf.identity(self.sources[1]))
            outputs._keras_logits = watched[1]
        mask = getattr(term.y_pred, "_keras_mask", None)
        if mask is not None:
            outputs._keras_mask = mask
        with tf.GradientTape() as tape:
            tape.watch(watched)
            loss = tf.reduce_sum(term.loss(term.y_true, outputs, term.sample_weight))
        gradients = tape.gradient(
            loss, watched, unconnected_gradients=tf.UnconnectedGradients.ZERO
        )
        values = term.loss.call(
            tf.cast(term.y_true, term.loss.dtype), tf.cast(outputs, term.loss.dtype)
        )
        # Masks that the loss itself attaches (ignore_class) show in its values.
        inner_mask = getattr(values, "_keras_mask", None)
        if inner_mask is not None:
            mask = inner_mask if mask is None else mask & inner_mask
        weights = element_coefficients(term, tf.zeros_like(values), mask)
        examples = tf.cast(tf.shape(outputs)[0], weights.dtype)
        if weights.shape.rank:
            weights = tf.reshape(weights, (tf.shape(weights)[0], -1))
            weights = examples * tf.reduce_sum(weights, axis=1)
        loss_weight = 1.0 if term.loss_weight is None else term.loss_weight
        scale = examples * tf.math.divide_no_nan(
            tf.cast(loss_weight, weights.dtype), tf.sqrt(weights)
        )
        return [_scale_examples(gradient, scale) for gradient in gradients]


def distribution_of(term: LossTerm) -> OutputDistribution:
    """The predictive distribution behind a Keras loss.

    Args:
        term: The loss term.

    Returns:
        An `OutputDistribution`.

    Raises:
        ValueError: If the loss has no known distribution.
    """
    loss = term.loss
    function = getattr(loss, "fn", None)
    options = dict(getattr(loss, "_fn_kwargs", {}))
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
    raise unknown_loss(getattr(loss, "name", None) or type(loss).__name__)


def unknown_loss(name: str) -> ValueError:
    """The error for a loss whose Fisher matrix is not known."""
    return ValueError(
        "The Fisher matrix of the model's own distribution is known for the losses "
        "sparse_categorical_crossentropy, categorical_crossentropy, binary_crossentropy "
        f'and mean_squared_error. Received: loss="{name}". Use '
        'fisher="empirical" to estimate the Fisher matrix of this loss from the training '
        "targets."
    )


@dataclasses.dataclass
class OutputDerivatives:
    """What to start the second backward passes of one forward pass from.

    Args:
        sources: Output tensors.
        count: Number of backward passes, a Python integer or a scalar tensor.
        derivatives: Function from the number of the pass to a tensor for each source.
    """

    sources: list[tf.Tensor]
    count: int | tf.Tensor
    derivatives: Callable[[tf.Tensor], list[tf.Tensor]]


def output_derivatives(
    terms: Sequence[LossTerm], fisher: str, seed: tf.Tensor
) -> OutputDerivatives:
    """Output derivatives of all loss terms of a model for one kind of Fisher matrix.

    Args:
        terms: The model's loss terms; draws for different terms are independent.
        fisher: `"sampled"`, `"empirical"` or `"exact"`.
        seed: Two integers, for `"sampled"`.

    Returns:
        An `OutputDerivatives`; Gamma is the sum over its backward passes.

    Raises:
        ValueError: If a loss has no known distribution and `fisher` needs one.
    """
    if fisher == "empirical":
        empirical = [EmpiricalDerivatives(term) for term in terms]
        return OutputDerivatives(
            [source for part in empirical for source in part.sources],
            1,
            lambda _: [tensor for part in empirical for tensor in part.derivatives()],
        )
    parts = [distribution_of(term) for term in terms]
    sources = [source for part in parts for source in part.sources]
    if fisher == "sampled":
        return OutputDerivatives(
            sources,
            1,
            lambda _: [
                tensor
                for number, part in enumerate(parts)
                for tensor in part.sample(seed + tf.constant([0, number], seed.dtype))
            ],
        )
    counts = [part.count_columns() for part in parts]

    def columns(index):
        tensors, first = [], 0
        for part, count in zip(parts, counts, strict=True):
            # Outside of the part's own range the one-hot choice is all zeros.
            tensors += part.column(tf.cast(index, tf.int32) - first)
            first += count
        return tensors

    return OutputDerivatives(sources, tf.add_n(counts), columns)


def _uniform(shape, seed, dtype):
    return tf.random.stateless_uniform(shape, seed, dtype=dtype, alg="philox")


def _scale_examples(tensor: tf.Tensor, scale: tf.Tensor) -> tf.Tensor:
    if scale.shape.rank:
        scale = tf.reshape(scale, tf.concat(([-1], tf.ones(tf.rank(tensor) - 1, tf.int32)), 0))
    return tf.cast(at_least_float32(tensor) * tf.cast(scale, at_least_float32(tensor).dtype), tensor.dtype)
