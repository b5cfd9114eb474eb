"""Products with the Jacobian of a forward pass that is over.

`Jᵀ u` is a backward pass. `J v` is the derivative of that backward pass with respect to `u`, in
which it is linear: no second forward pass is needed, so that what was random or changed
variables in the first is the same, and whatever layers can be differentiated twice can be in
between. Of the backward pass itself the graph keeps nothing.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import tensorflow as tf


class Jacobian:
    """The Jacobian `J` of some outputs of a forward pass with regard to some variables.

    Args:
        tape: The persistent tape that recorded the pass and watched the variables.
        sources: The outputs.
        variables: The variables. What the outputs do not depend on has zeros.
        around: Makes a context for its backward passes.
    """

    def __init__(
        self,
        tape: tf.GradientTape,
        sources: Sequence[tf.Tensor],
        variables: Sequence[Any],
        around: Callable[[], AbstractContextManager[None]] = nullcontext,
    ):
        self._around = around
        self._tape = tape
        self._sources = list(sources)
        self._of = [getattr(variable, "value", variable) for variable in variables]

    def transposed_times(self, cotangents: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        """`Jᵀ u`, a tensor for each variable.

        Args:
            cotangents: A tensor for each source, of its shape and dtype.
        """
        with self._around():
            gradients = self._tape.gradient(
                self._sources,
                self._of,
                output_gradients=list(cotangents),
                unconnected_gradients=tf.UnconnectedGradients.ZERO,
            )
        return [tf.convert_to_tensor(gradient) for gradient in gradients]

    def times(self, vectors: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        """`J v`, a tensor for each source, of its shape and dtype.

        Args:
            vectors: A tensor for each variable, of its shape.
        """
        zeros = [tf.zeros_like(source) for source in self._sources]
        with tf.GradientTape() as tape:
            tape.watch(zeros)
            gradients = self.transposed_times(zeros)
        tangents = [
            tf.cast(vector, gradient.dtype)
            for vector, gradient in zip(vectors, gradients, strict=True)
        ]
        return list(
            tape.gradient(
                gradients,
                zeros,
                output_gradients=tangents,
                unconnected_gradients=tf.UnconnectedGradients.ZERO,
            )
        )
