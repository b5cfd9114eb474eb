"""A loss as a function of the outputs, element by element, with its second derivatives.

A loss returns values `ℓ_e`, one for each *element*: an example, or one position of an
example. Where `ℓ_e` depends on n outputs of its own, the Hessian in the outputs has a block
for each element; where it is a sum of functions of one output each, that is diagonal.

Tensors: B examples, E elements of one example (1 without positions), n outputs of one
element; `(B, E, n)` is "by elements".
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from keras_kfc._compat.keras_internals import logits_of, set_logits
from keras_kfc.linalg.precision import at_least_float32
from keras_kfc.losses.terms import LossTerm, loss_values, root_coefficients

# Outputs of one element up to which Hessians are taken apart whole.
LARGEST_BLOCK = 16


class ElementwiseView:
    """One loss term as a function of its outputs, by elements.

    Args:
        term: The loss term; `y_true` is needed.
        axes: The axes of the outputs that one value depends on, or None for those that
            the values lack, at the end.
        in_logits: Whether to differentiate with respect to the logits of a softmax or a
            sigmoid where the outputs have them, or None to do so where the loss function
            itself uses these logits, as Keras's cross-entropies do.

    Attributes:
        source: The tensor to start a backward pass from, outputs or logits.
        aligned: Whether each value can belong to an element; nothing below is there if not.
        size: n, or None where it is not known before the graph runs.
        values: The values `ℓ_e`, `(B, E)`.
        gradient: Their derivatives in the element's own outputs, by elements.
        scale: `sqrt(B c_e)`, `(B, E, 1)`.
        typical_value: Weighted mean of `|ℓ_e|`, a scalar.
    """

    def __init__(
        self, term: LossTerm, axes: Sequence[int] | None = None, in_logits: bool | None = False
    ):
        outputs = term.y_pred
        self._term = term
        self._link = self._link_of(outputs) if in_logits is not False else None
        if self._link is not None and in_logits is None and not self._uses_logits():
            self._link = None
        self.source: Any = outputs if self._link is None else logits_of(outputs)
        self._point = at_least_float32(tf.identity(self.source))
        values, mask = self._evaluate(self._point)
        self._arrange(values, axes)
        if not self.aligned:
            return
        gradient, _ = self._derivatives(None)
        self.gradient = self.by_elements(gradient)
        examples = tf.shape(self._point)[0]
        roots = root_coefficients(term, values, mask, examples)
        self.scale = tf.reshape(roots, (examples, -1, 1))
        self.values = tf.reshape(values, (examples, -1))
        weights = tf.square(self.scale[..., 0])
        total = tf.reduce_sum(tf.math.multiply_no_nan(tf.abs(self.values), weights))
        self.typical_value = tf.math.divide_no_nan(total, tf.reduce_sum(weights))

    def _arrange(self, values: tf.Tensor, axes: Sequence[int] | None) -> None:
        """Finds which axes of the outputs are elements, and which belong to one element."""
        rank, shape = self._point.shape.rank, self._point.shape
        own = None if axes is None else sorted(axis % rank for axis in axes)
        if values.shape.rank is not None and (own is None or rank - len(own) != values.shape.rank):
            own = list(range(min(values.shape.rank, rank), rank))
        elements = [axis for axis in range(rank) if axis not in (own or [])]
        self.aligned = (
            bool(values.shape.rank)
            and elements[0] == 0
            and list(values.shape) == [shape[axis] for axis in elements]
        )
        self._own = own or []
        self._order = [*elements, *self._own]
        sizes = [shape[axis] for axis in self._own]
        self.size = None if None in sizes else math.prod(sizes)

    def by_elements(self, tensor: tf.Tensor) -> tf.Tensor:
        """Brings a tensor of the shape of `source` into `(B, E, n)`."""
        tensor = tf.transpose(tensor, self._order)
        shape = tf.shape(tensor)
        count = len(self._order) - len(self._own)
        size = tf.reduce_prod(shape[count:]) if self.size is None else self.size
        return tf.reshape(tensor, (shape[0], tf.reduce_prod(shape[1:count]), size))

    def like_source(self, tensor: tf.Tensor) -> tf.Tensor:
        """Undoes `by_elements`, in the dtype of `source`."""
        return tf.cast(self._like_point(tensor), self.source.dtype)

    def hessian_times(self, directions: tf.Tensor) -> tf.Tensor:
        """The Hessian of `Σ_e ℓ_e` times a vector, both by elements."""
        return self.by_elements(self._derivatives(self._like_point(directions))[1])

    def blocks(self) -> tf.Tensor:
        """The Hessian of each `ℓ_e`, if it depends on the element's own outputs alone.

        Returns:
            `(B, E, n, n)`, symmetric and finite.
        """
        ones = tf.ones_like(self.gradient)
        rows = tf.map_fn(
            lambda unit: self.hessian_times(unit * ones), tf.eye(self.size, dtype=ones.dtype)
        )
        hessian = tf.transpose(rows, (1, 2, 0, 3))
        hessian = (hessian + tf.linalg.matrix_transpose(hessian)) / 2
        return tf.where(tf.math.is_finite(hessian), hessian, 0)

    def _like_point(self, tensor: tf.Tensor) -> tf.Tensor:
        shape = tf.gather(tf.shape(self._point), self._order)
        back = [self._order.index(axis) for axis in range(len(self._order))]
        tensor = tf.transpose(tf.reshape(tensor, shape), back)
        return tf.ensure_shape(tensor, self._point.shape)

    def _evaluate(self, point: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor | None]:
        if self._link is not None:
            outputs = self._link(point)
            set_logits(outputs, point)
        else:
            # Without logits: the function of the outputs, whatever Keras makes of them.
            outputs = tf.identity(point)
        return loss_values(self._term, outputs, point.dtype)

    def _derivatives(self, direction: tf.Tensor | None) -> tuple[tf.Tensor, tf.Tensor | None]:
        """The gradient of `Σ_e ℓ_e`, and the Hessian times a direction if one is given."""
        zero = tf.UnconnectedGradients.ZERO
        point = tf.identity(self._point)
        with tf.GradientTape() as outer:
            outer.watch(point)
            with tf.GradientTape() as inner:
                inner.watch(point)
                total = tf.reduce_sum(self._evaluate(point)[0])
            gradient = inner.gradient(total, point, unconnected_gradients=zero)
        if direction is None:
            return gradient, None
        product = outer.gradient(
            gradient, point, output_gradients=direction, unconnected_gradients=zero
        )
        return gradient, product

    def _link_of(self, outputs: tf.Tensor) -> Callable[[tf.Tensor], tf.Tensor] | None:
        """The activation that made outputs of logits, if it is a softmax or a sigmoid."""
        logits = logits_of(outputs)
        if logits is None:
            return None
        for kind, link in (("Softmax", tf.nn.softmax), ("Sigmoid", tf.sigmoid)):
            if tf.is_symbolic_tensor(outputs):
                if outputs.op.type == kind:
                    return link
            elif bool(tf.reduce_all(tf.abs(link(logits) - outputs) < 1e-3)):
                return link
        return None

    def _uses_logits(self) -> bool:
        outputs = tf.identity(at_least_float32(self._term.y_pred))
        logits = at_least_float32(tf.identity(logits_of(self._term.y_pred)))
        set_logits(outputs, logits)
        with tf.GradientTape() as tape:
            tape.watch(logits)
            total = tf.reduce_sum(loss_values(self._term, outputs, logits.dtype)[0])
        return tape.gradient(total, logits) is not None


def independent(view: ElementwiseView) -> tuple[tf.Tensor, tf.Tensor]:
    """Checks, on the batch at hand, what the loss values depend on.

    With `z` drawn from a continuous distribution, `(H z)_i - z_i (H 1)_i` is
    `Σ_j H_ij (z_j - z_i)`, which almost surely vanishes only if no output has a common
    second derivative with another. With one factor `t_e` for each element, `H (t ∘ z)` is
    `t ∘ (H z)` only if none has with an output of another element.

    Args:
        view: The loss.

    Returns:
        Whether the Hessian is diagonal, and whether it has a block for each element; two
        boolean scalars.
    """
    shape, dtype = tf.shape(view.gradient), view.gradient.dtype

    def draw(shape: tf.Tensor, number: int) -> tf.Tensor:
        return tf.random.stateless_uniform(shape, (number, 0), -1, 1, dtype, alg="philox")

    z, t = draw(shape, 1), draw(tf.concat((shape[:2], [1]), 0), 2)
    product = view.hessian_times(z)
    diagonal = _same(product, z * view.hessian_times(tf.ones_like(z)))
    if view.size == 1:
        return diagonal, diagonal
    return diagonal, _same(view.hessian_times(t * z), t * product)


def _same(one: tf.Tensor, other: tf.Tensor) -> tf.Tensor:
    """Whether tensors are equal up to rounding; broken numbers are equal to nothing."""
    error = tf.norm(one - other)
    return error <= 1e-3 * (tf.norm(one) + tf.norm(other))
