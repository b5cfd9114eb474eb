"""What structures of blocks share."""

import abc
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import keras
import tensorflow as tf

from keras_kfc.curvature.api import CurvatureBlock, Refresh
from keras_kfc.maps.api import LinearMap, masked
from keras_kfc.maps.weights import VariableIndices

Layout = TypeVar("Layout")


class BlockStructure(Generic[Layout]):
    """A structure whose blocks and inverses are classes of their own.

    Attributes:
        block_type: Class of the blocks, made like `keras_kfc.curvature.averaging.AveragedBlock`.
        refresh_type: Class of new inverses, made of blocks.
    """

    for_any_map = True
    block_type: Callable[..., Any]
    refresh_type: Callable[[Sequence[Any]], Refresh]

    def block(
        self,
        path: str,
        layout: Layout,
        indices: VariableIndices,
        dtype: str,
        add_variable: Callable[..., keras.Variable],
    ) -> CurvatureBlock:
        """A block with its variables."""
        return type(self).block_type(path, layout, indices, dtype, add_variable)

    def refresh(self, blocks: Sequence[Any]) -> Refresh:
        """New inverses of all blocks."""
        return type(self).refresh_type(blocks)


@dataclasses.dataclass(frozen=True)
class LayoutOfExamples(abc.ABC):
    """A layout of one factor, measured from the derivatives of single examples.

    Args:
        linear_map: The layer's weights as a linear map.
        use_bias: Whether they have a row for the bias.
    """

    linear_map: LinearMap
    use_bias: bool
    needs_inputs = True

    @property
    def weights_shape(self) -> tuple[int, int, int]:
        """`(G, n, m)`."""
        groups = self.linear_map.groups
        rows = self.linear_map.kernel_rows + self.use_bias
        return (groups, rows, self.linear_map.outputs // groups)

    def rows(self, inputs: tf.Tensor) -> tf.Tensor:
        """What each position sees, with a 1 for the bias, `(G, positions, n)`."""
        rows = self.linear_map.input_rows(inputs)
        if not self.use_bias:
            return rows
        return tf.concat((rows, tf.ones_like(rows[..., :1])), axis=2)

    def columns(self, derivatives: tf.Tensor) -> tf.Tensor:
        """Derivatives by position, `(G, positions, m)`."""
        return self.linear_map.derivative_rows(derivatives)

    def from_inputs(
        self,
        inputs: Sequence[tf.Tensor],
        batch_size: tf.Tensor,
        masks: Sequence[tf.Tensor | None],
    ) -> tuple[tf.Tensor, ...]:
        """Nothing: inputs alone do not tell."""
        del inputs, batch_size, masks
        return ()

    def from_pass(
        self,
        inputs: Sequence[tf.Tensor],
        derivatives: Sequence[tf.Tensor],
        batch_size: tf.Tensor,
        masks: Sequence[tf.Tensor | None],
    ) -> tuple[tf.Tensor, ...]:
        """The mean over examples of what `sum_over_examples` adds up."""
        total = tf.add_n(
            [
                self.sum_over_examples(a, masked(ds, mask))
                for a, ds, mask in zip(inputs, derivatives, masks, strict=True)
            ]
        )
        return (total / tf.cast(batch_size, total.dtype),)

    @abc.abstractmethod
    def sum_over_examples(self, inputs: tf.Tensor, derivatives: tf.Tensor) -> tf.Tensor:
        """The sum over examples for one use of the layer, in the shape of the factor."""

    def compromises(self, max_dim: int | None) -> list[str]:
        """None: what is kept does not depend on the limit."""
        del max_dim
        return []


class TableStructure(BlockStructure[Layout]):
    """A structure for tables of rows alone, whose size no limit concerns.

    Attributes:
        layout_type: Class of the layouts, made of a table's linear map.
    """

    for_any_map = False
    layout_type: Callable[[Any], Any]

    def layout(
        self,
        linear_map: LinearMap,
        use_bias: bool,
        max_dim: int | None,
        weight_sharing: str = "expand",
    ) -> Layout:
        """The layout of a table."""
        del use_bias, max_dim, weight_sharing
        return type(self).layout_type(linear_map)
