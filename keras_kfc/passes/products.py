"""Gradients that are the product of two thin matrices.

The gradient of a layer's weights is `D = Aᵀ E`, with the rows of its inputs, `A`, and the
derivatives of the loss with respect to its pre-activations, `E`. A preconditioner can be applied to
these instead of their product. But a gradient may hold more than that: a regulariser's part,
another use of the kernel, what a user did to it. Whether it does is read off the graph: it does
not if the tensor comes from a product that `E` itself goes into. In eager mode there is no graph
to read.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import tensorflow as tf

from keras_kfc.maps.weights import WeightMatrix
from keras_kfc.passes.capture import Capture
from keras_kfc.passes.records import LayerRecord, Use

# Operations that change the form of a tensor alone.
_FORM = {"Identity", "IdentityN", "Reshape", "Cast", "Transpose", "ExpandDims", "Squeeze"}
_PRODUCTS = {"MatMul", "BatchMatMulV2", "Einsum", "Conv2DBackpropFilter", "Conv3DBackpropFilterV2"}
_SUMS = {"BiasAddGrad", "Sum"}


@dataclasses.dataclass(frozen=True)
class GradientProduct:
    """The gradient of one matrix as `Aᵀ E`.

    Args:
        matrix: The matrix.
        use: The use of it that the gradient comes from.
        gradients: The tensors that hold the gradient: the kernel's, and the bias's if it has one.
    """

    matrix: WeightMatrix
    use: Use
    gradients: tuple[tf.Tensor, ...]

    @property
    def positions(self) -> int | None:
        """Rows of `A` for each example, or None where that is not known."""
        shape = self.use.pre_activation.shape[1:]
        if not shape.is_fully_defined():
            return None
        return math.prod(shape) // self.matrix.linear_map.outputs

    @property
    def batch_size(self) -> int | None:
        """Number of examples, or None where that is not known while the graph is built."""
        return self.use.pre_activation.shape[0]

    def rows(self, dtype: Any) -> tuple[tf.Tensor, tf.Tensor]:
        """`A` with a column of ones for the bias, `(G, R, n)`, and `E`, `(G, R, m)`."""
        linear_map = self.matrix.linear_map
        inputs = tf.cast(linear_map.input_rows(self.use.dense_inputs()), dtype)
        if len(self.gradients) > 1:
            inputs = tf.concat((inputs, tf.ones_like(inputs[..., :1])), axis=2)
        return inputs, tf.cast(linear_map.derivative_rows(self.use.derivative), dtype)


def products_in(
    capture: Capture, gradients: Sequence[Any], variables: Sequence[Any]
) -> dict[int, GradientProduct]:
    """The gradients of a captured pass that are products, by the identity of their kernel.

    Args:
        capture: The pass, whose loss has been differentiated.
        gradients: The gradients; None for a variable without.
        variables: Their variables.
    """
    if tf.executing_eagerly():
        return {}
    of = {id(variable): gradient for variable, gradient in zip(variables, gradients, strict=True)}
    found = {key: _product(record, of) for key, record in capture.records.items()}
    return {key: product for key, product in found.items() if product is not None}


def _product(record: LayerRecord, gradients: Mapping[int, Any]) -> GradientProduct | None:
    if len(record.uses) != 1 or record.matrix.further_kernels:
        return None
    use, matrix = record.uses[0], record.matrix
    derivative = use.derivative
    kernel = gradients.get(id(matrix.kernel))
    if derivative is None or use.is_added or not _comes_from(kernel, _PRODUCTS, derivative):
        return None
    if matrix.bias is None:
        return GradientProduct(matrix, use, (kernel,))
    bias = gradients.get(id(matrix.bias))
    if not _comes_from(bias, _SUMS, derivative):
        return None
    return GradientProduct(matrix, use, (kernel, bias))


def _comes_from(gradient: Any, kinds: set[str], derivative: tf.Tensor) -> bool:
    """Whether a tensor is the result of an operation of some kinds that another goes into."""
    if not isinstance(gradient, tf.Tensor):
        return False
    result = _without_form(gradient)
    # A kernel that is multiplied with each example has its gradients summed.
    if result.op.type == "Sum" and "Sum" not in kinds:
        result = _without_form(result.op.inputs[0])
        if result.op.type != "BatchMatMulV2":
            return False
    source = _without_form(derivative)
    return result.op.type in kinds and any(_without_form(t) is source for t in result.op.inputs)


def _without_form(tensor: tf.Tensor) -> tf.Tensor:
    """What a tensor was before operations that change its form alone."""
    while tensor.op.type in _FORM:
        # An identity of several tensors keeps their places.
        place = tensor.value_index if tensor.op.type == "IdentityN" else 0
        tensor = tensor.op.inputs[place]
    return tensor
