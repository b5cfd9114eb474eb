"""Which blocks a list of variables gets, and of which structure."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from keras_kfc.curvature.api import STRUCTURES, BlockLayout
from keras_kfc.layers.instrumented import parameter_groups


@dataclasses.dataclass(frozen=True)
class PlannedBlock:
    """One layer's block before it has variables.

    Args:
        path: The layer's path.
        structure: Name of its structure.
        layout: What it will keep.
        kernel: Index of the kernel.
        bias: Index of the bias, or None.
    """

    path: str
    structure: str
    layout: BlockLayout
    kernel: int
    bias: int | None


def planned_blocks(
    variables: Sequence[Any], structure: str, max_factor_dim: int | None
) -> Iterator[PlannedBlock]:
    """The blocks that an optimizer has, or would have, for some trainable variables.

    Args:
        variables: The variables.
        structure: Name of the structure for layer kinds that have no choice of their own.
        max_factor_dim: Rows beyond which a factor is cut into diagonal blocks, or None.
    """
    for index, layer, bias in parameter_groups(variables):
        name = layer.curvature_structure or structure
        layout = STRUCTURES[name].layout(layer.linear_map, bias is not None, max_factor_dim)
        yield PlannedBlock(layer.path, name, layout, index, bias)
