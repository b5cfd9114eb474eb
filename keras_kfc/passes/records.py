"""What is noted of a forward pass: the uses of each matrix, and the loss."""

import dataclasses
from typing import Any

import keras
import tensorflow as tf

from keras_kfc.maps.api import LinearMap
from keras_kfc.maps.weights import WeightMatrix


@dataclasses.dataclass(eq=False)
class Use:
    """One use of one layer in a forward pass, and what its backward passes tell of it.

    Args:
        kernel: The kernel variable of one of its matrices.
        inputs: The matrix's input `a`, or a function that computes it in the graph that asks.
        pre_activation: Its pre-activation `s`.
        mask: Keras's mask of the input, booleans for its first axes, or None.
        derivative: What ordinary backward passes sent to `s`, their sum, or None if there was
            none. Only those count that differentiate with regard to the kernel: a generator's
            loss reaches a discriminator's layers, too, but its gradient is not theirs.
        is_added: Whether `pre_activation` is zeros that are added to the layer's own, which has the
            same derivative.
        differentiated_again: Whether a gradient of the kernel goes through a derivative of `s`,
            as that of a differential equation or of a gradient penalty does.
    """

    kernel: keras.Variable
    inputs: Any
    pre_activation: tf.Tensor
    mask: tf.Tensor | None = None
    derivative: tf.Tensor | None = None
    is_added: bool = False
    differentiated_again: bool = False

    def dense_inputs(self) -> tf.Tensor:
        """The input as a dense tensor; to be called where it is needed.

        Floating-point numbers, unless a function computes it, whose result is taken as it is.
        """
        if callable(self.inputs):
            return self.inputs()
        inputs = self.inputs
        dense = tf.sparse.to_dense(inputs) if isinstance(inputs, tf.SparseTensor) else inputs
        return dense if dense.dtype.is_floating else tf.cast(dense, self.pre_activation.dtype)


@dataclasses.dataclass
class LayerRecord:
    """All uses of one matrix of an instrumented layer in one forward pass.

    Args:
        path: The matrix's path, for messages.
        matrix: The matrix.
        uses: Its uses, in their order.
    """

    path: str
    matrix: WeightMatrix
    uses: list[Use] = dataclasses.field(default_factory=list)

    @property
    def linear_map(self) -> LinearMap:
        """How the matrix's tensors map to Kronecker factors."""
        return self.matrix.linear_map

    def differentiated_uses(self) -> list[Use]:
        """The uses that the ordinary backward pass has reached."""
        return [use for use in self.uses if use.derivative is not None]


@dataclasses.dataclass
class LossEvaluation:
    """One call of a compiled loss.

    Args:
        compiled: Keras's `CompileLoss`.
        y_true: Targets.
        y_pred: Outputs.
        sample_weight: Sample weights or None.
        value: The loss, without regularisation and added losses, a scalar.
    """

    compiled: Any
    y_true: Any
    y_pred: Any
    sample_weight: Any
    value: tf.Tensor
