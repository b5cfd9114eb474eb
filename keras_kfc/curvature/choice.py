"""Which blocks a list of variables gets, and of which structure."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from keras_kfc.curvature.api import STRUCTURES, BlockLayout
from keras_kfc.layers.groups import parameter_groups
from keras_kfc.maps.weights import VariableIndices


@dataclasses.dataclass(frozen=True)
class PlannedBlock:
    """One block before it has variables.

    Args:
        path: Path of its matrix.
        structure: Name of its structure.
        layout: What it will keep.
        indices: Where its variables are among the optimizer's.
    """

    path: str
    structure: str
    layout: BlockLayout
    indices: VariableIndices

    @property
    def kernel_index(self) -> int:
        """Index of the kernel by which everybody knows the matrix."""
        return self.indices.kernels[0]


def planned_blocks(
    variables: Sequence[Any],
    structure: str,
    max_factor_dim: int | None,
    weight_sharing: str | None = None,
) -> Iterator[PlannedBlock]:
    """The blocks that an optimizer has, or would have, for some trainable variables.

    Args:
        variables: The variables.
        structure: Name of the structure for matrices that have no choice of their own.
        max_factor_dim: Rows beyond which a factor is cut into diagonal blocks, or None.
        weight_sharing: The setting for weights that an example uses at many positions, or None
            for that of each layer kind.
    """
    for group in parameter_groups(variables):
        name = group.matrix.structure or structure
        use_bias = group.indices.bias is not None
        layout = STRUCTURES[name].layout(
            group.matrix.linear_map,
            use_bias,
            max_factor_dim,
            weight_sharing or group.matrix.weight_sharing,
        )
        yield PlannedBlock(group.path, name, layout, group.indices)
