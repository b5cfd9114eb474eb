"""Output derivatives of losses that are no likelihood with a name: their output Hessian.

A family here is a root `R_e` of a positive semi-definite matrix for each element, in the
notation of `keras_kfc.losses.likelihood`. It is the Hessian `H_e` of the element's loss in its
outputs, made positive:

* diagonal, for a sum or mean of functions of one output each. An output whose second
  derivative is not positive, because it vanishes (absolute errors, hinges) or because the
  loss bends down there, has `n g² / (2 m)` instead, with g its derivative and m the mean
  `|ℓ_e|` of the batch. For `n = 1` and `ℓ = m` that is the curvature of the parabola with
  this value and slope whose lowest value is zero, it is in the units of a second
  derivative, and it is the Fisher matrix of `exp(-ℓ / m)` where `ℓ` is an absolute error
  (a Laplace distribution of that scale) up to the factor 1/2.
* whole, for losses of few outputs: negative eigenvalues are set to zero. An element with
  no positive one has `g gᵀ / (2 m)` instead.
* known in closed form; see `keras_kfc.losses.closed_forms`.

Tensors are by elements, `(B, E, n)`, as `keras_kfc.losses.elements` defines it.
"""

from collections.abc import Callable

import tensorflow as tf

from keras_kfc.losses.elements import LARGEST_BLOCK, ElementwiseView, independent
from keras_kfc.losses.signs import random_signs

# Second derivatives of less than this part of what stands in for them count as none.
_NOTHING = 1e-6

Root = Callable[[tf.Tensor], tf.Tensor]


class OutputHessian:
    """Output derivatives from a root of each element's Hessian.

    Args:
        view: The loss by elements.
        root: Function that multiplies `R_e` with a vector for each element, `(B, E, n)`
            to the same.

    Attributes:
        sources: Tensors to start the backward pass from (one tensor).
    """

    def __init__(self, view: ElementwiseView, root: Root):
        self.sources = [view.source]
        self._view = view
        self._root = root
        self._shape = tf.shape(view.gradient)

    def sample(self, seed: tf.Tensor) -> list[tf.Tensor]:
        """Derivatives `R z` for independent random signs z.

        Args:
            seed: Two integers.

        Returns:
            A tensor for each of `sources`, of its shape and dtype.
        """
        return self._finish(random_signs(self._shape, seed, self._view.gradient.dtype))

    def root_shape(self) -> tf.Tensor:
        """Shape of what R is multiplied with, `(B, E, n)`."""
        return self._shape

    def root_times(self, z: tf.Tensor) -> list[tf.Tensor]:
        """Derivatives `R z`, as `sample` returns them."""
        return self._finish(tf.cast(z, self._view.gradient.dtype))

    def count_columns(self) -> tf.Tensor:
        """Number of columns of R for one example, E n."""
        return tf.reduce_prod(self._shape[1:])

    def column(self, index: tf.Tensor) -> list[tf.Tensor]:
        """Derivatives for column `index` of R, as `sample` returns them."""
        chosen = tf.one_hot(index, self.count_columns(), dtype=self._view.gradient.dtype)
        chosen = tf.reshape(chosen, tf.concat(([1], self._shape[1:]), axis=0))
        return self._finish(tf.broadcast_to(chosen, self._shape))

    def _finish(self, z: tf.Tensor) -> list[tf.Tensor]:
        scale = tf.cast(self._view.scale, z.dtype)
        # A masked element counts as nothing even where its loss is broken.
        return [self._view.like_source(tf.math.multiply_no_nan(self._root(z), scale))]


def diagonal_root(view: ElementwiseView) -> Root:
    """Of a loss that is a sum or mean of functions of one output each."""
    return _multiplier(_positive_diagonal(view))


def whole_root(view: ElementwiseView) -> Root:
    """Of a loss of few outputs for each element, that no other element shares."""
    root = _positive_block_root(view)
    return lambda z: tf.linalg.matvec(root, z)


def checked_root(view: ElementwiseView) -> Root:
    """Of any loss with a value for each element; each batch is checked for what it is.

    Diagonal, whole if there are few outputs, or, where elements share outputs or are
    large, the element's own derivative (the empirical Fisher matrix).
    """
    is_diagonal, has_blocks = independent(view)
    diagonal = tf.sqrt(_positive_diagonal(view))
    if view.size is None or view.size > LARGEST_BLOCK:
        return lambda z: tf.where(is_diagonal, diagonal * z, view.gradient * z[..., :1])

    def rank_one() -> tf.Tensor:
        first = tf.one_hot(0, view.size, dtype=view.gradient.dtype)
        return view.gradient[..., None] * first

    root = tf.cond(
        is_diagonal,
        lambda: tf.linalg.diag(diagonal),
        lambda: tf.cond(has_blocks, lambda: _positive_block_root(view), rank_one),
    )
    return lambda z: tf.linalg.matvec(root, z)


def closed_form_root(view: ElementwiseView, curvature: tf.Tensor) -> Root:
    """Of a diagonal Hessian that is given, of the shape of the outputs."""
    return _multiplier(view.by_elements(curvature))


def _multiplier(diagonal: tf.Tensor) -> Root:
    root = tf.sqrt(diagonal)
    return lambda z: root * z


def _positive_diagonal(view: ElementwiseView) -> tf.Tensor:
    """Second derivatives, or what stands in for them, by elements."""
    second = view.hessian_times(tf.ones_like(view.gradient))
    outputs = tf.cast(tf.shape(second)[-1], second.dtype)
    typical = tf.cast(view.typical_value, second.dtype)
    instead = tf.math.divide_no_nan(outputs * tf.square(view.gradient), 2 * typical)
    return tf.where(second > _NOTHING * instead, second, instead)


def _positive_block_root(view: ElementwiseView) -> tf.Tensor:
    """`(B, E, n, n)`, a matrix R with `R Rᵀ` the positive part of each element's Hessian."""
    eigenvalues, vectors = tf.linalg.eigh(view.blocks())
    root = vectors * tf.sqrt(tf.maximum(eigenvalues, 0))[..., None, :]
    typical = tf.cast(view.typical_value, root.dtype)
    instead = tf.math.divide_no_nan(view.gradient, tf.sqrt(2 * typical))
    first = tf.one_hot(0, view.size, dtype=root.dtype)
    bends_up = eigenvalues[..., -1] > _NOTHING * tf.reduce_sum(tf.square(instead), -1)
    return tf.where(bends_up[..., None, None], root, instead[..., None] * first)
