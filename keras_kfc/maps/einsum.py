"""An einsum of inputs and a kernel as a linear map.

The axes of the three tensors fall into four kinds, by where their labels stand:

    positions   in inputs and outputs; the first is that of examples
    inputs      in inputs and kernel: summed over
    outputs     in kernel and outputs
    groups      in all three: a matrix for each index

Anything else, such as an axis of the inputs that only they have, is no product of matrices.
"""

import dataclasses
import math
import string

import tensorflow as tf

from keras_kfc.linalg.precision import at_least_float32
from keras_kfc.linalg.products import gram, sum_of_rows
from keras_kfc.maps.api import pad_and_split_columns


@dataclasses.dataclass(frozen=True)
class EinsumMap:
    """How the tensors of `keras.layers.EinsumDense` map to its weights with bias.

    Args:
        input_labels: A letter for each axis of the inputs, such as `"abc"`.
        kernel_labels: Likewise of the kernel, such as `"cde"`.
        output_labels: Likewise of the outputs, such as `"abde"`.
        kernel_shape: Shape of the kernel.
        bias_shape: Shape of a bias that has a number for each output of each group, or None.

    Raises:
        ValueError: If the einsum is no product of matrices over shared axes.
    """

    input_labels: str
    kernel_labels: str
    output_labels: str
    kernel_shape: tuple[int, ...]
    bias_shape: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        every = (self.input_labels, self.kernel_labels, self.output_labels)
        inputs, kernel, outputs = map(set, every)
        alone = (inputs ^ kernel ^ outputs) - (inputs & kernel & outputs)
        repeated = any(len(set(labels)) < len(labels) for labels in every)
        same_examples = self.input_labels[0] == self.output_labels[0]
        if alone or repeated or not same_examples or self.input_labels[0] in kernel:
            raise ValueError(
                "Argument `equation` must be a product of matrices over shared axes, whose first "
                "axis is that of examples, for a Kronecker block. Received: equation="
                f"'{self.input_labels},{self.kernel_labels}->{self.output_labels}'"
            )

    @property
    def _group_axes(self) -> str:
        shared = set(self.input_labels) & set(self.output_labels)
        return "".join(label for label in self.kernel_labels if label in shared)

    @property
    def _summed_axes(self) -> str:
        inputs, outputs = self.input_labels, self.output_labels
        return "".join(x for x in self.kernel_labels if x in inputs and x not in outputs)

    @property
    def _output_axes(self) -> str:
        return "".join(label for label in self.kernel_labels if label not in self.input_labels)

    @property
    def _positions(self) -> str:
        return "".join(label for label in self.input_labels if label not in self.kernel_labels)

    def _size(self, labels: str) -> int:
        sizes = dict(zip(self.kernel_labels, self.kernel_shape, strict=True))
        return math.prod(sizes[label] for label in labels)

    @property
    def groups(self) -> int:
        """Number of matrices."""
        return self._size(self._group_axes)

    @property
    def inputs(self) -> int:
        """Inputs of all matrices together."""
        return self.groups * self.kernel_rows

    @property
    def outputs(self) -> int:
        """Outputs of all matrices together."""
        return self.groups * self._size(self._output_axes)

    @property
    def kernel_rows(self) -> int:
        """Rows of the weights with bias that belong to the kernel."""
        return self._size(self._summed_axes)

    @property
    def keeps_positions(self) -> bool:
        """Whether the first two axes are positions in inputs and outputs alike."""
        positions = self._positions
        labels = self.input_labels[:2]
        return self.output_labels[:2] == labels and all(label in positions for label in labels)

    def input_moments(self, inputs: tf.Tensor, parts: int = 1) -> tuple[tf.Tensor, tf.Tensor]:
        """Sums of `a aᵀ` and `a` over examples and positions, `(G * P, c, c)` and `(G * P, c)`."""
        rows = pad_and_split_columns(self.input_rows(inputs), parts)
        return gram(rows), sum_of_rows(rows)

    def input_rows(self, inputs: tf.Tensor) -> tf.Tensor:
        """The inputs of each matrix, `(G, positions of all examples, J / G)`."""
        order = self._group_axes + self._positions + self._summed_axes
        rows = _transposed(at_least_float32(inputs), self.input_labels, order)
        return tf.reshape(rows, (self.groups, -1, self.kernel_rows))

    def count_positions(self, inputs: tf.Tensor) -> tf.Tensor:
        """Number of output positions of all examples together, a scalar."""
        return tf.size(inputs) // self.inputs

    def derivative_rows(self, derivatives: tf.Tensor) -> tf.Tensor:
        """Flattens derivatives of pre-activations to `(G, positions of all examples, I / G)`."""
        order = self._group_axes + self._positions + self._output_axes
        rows = _transposed(at_least_float32(derivatives), self.output_labels, order)
        return tf.reshape(rows, (self.groups, -1, self.outputs // self.groups))

    def stack_bias(self, kernel: tf.Tensor, bias: tf.Tensor | None) -> tf.Tensor:
        """Joins kernel and bias to `(G, n, I / G)`."""
        columns = self.outputs // self.groups
        order = self._group_axes + self._summed_axes + self._output_axes
        rows = _transposed(kernel, self.kernel_labels, order)
        rows = tf.reshape(rows, (self.groups, self.kernel_rows, columns))
        if bias is None:
            return rows
        bias = tf.reshape(bias, [self._size(label) for label in self._bias_axes])
        bias = _transposed(bias, self._bias_axes, self._group_axes + self._output_axes)
        return tf.concat((rows, tf.reshape(bias, (self.groups, 1, columns))), axis=1)

    def unstack_bias(self, weights: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor | None]:
        """Splits `(G, n, I / G)` into kernel and bias (or None)."""
        order = self._group_axes + self._summed_axes + self._output_axes
        kernel = tf.reshape(weights[:, : self.kernel_rows], [self._size(x) for x in order])
        kernel = _transposed(kernel, order, self.kernel_labels)
        if weights.shape[1] == self.kernel_rows:
            return kernel, None
        order = self._group_axes + self._output_axes
        bias = tf.reshape(weights[:, self.kernel_rows], [self._size(x) for x in order])
        bias = _transposed(bias, order, self._bias_axes)
        return kernel, tf.reshape(bias, self.bias_shape)

    @property
    def _bias_axes(self) -> str:
        """Labels of the bias's axes, in their order, which is that of the outputs."""
        return "".join(label for label in self.output_labels if label in self.kernel_labels)


def labels_of(equation: str, rank: int) -> tuple[str, str, str]:
    """Letters for each axis of inputs, kernel and outputs; those that `...` stands for, too.

    Args:
        equation: As in `keras.layers.EinsumDense`.
        rank: Number of axes of the inputs.
    """
    sources, outputs = equation.replace(" ", "").split("->")
    inputs, kernel = sources.split(",")
    free = (letter for letter in string.ascii_letters if letter not in equation)
    missing = rank - len(inputs.replace("...", ""))
    left_out = "".join(next(free) for _ in range(missing))
    return inputs.replace("...", left_out), kernel, outputs.replace("...", left_out)


def _transposed(tensor: tf.Tensor, labels: str, order: str) -> tf.Tensor:
    return tensor if labels == order else tf.transpose(tensor, [labels.index(x) for x in order])
