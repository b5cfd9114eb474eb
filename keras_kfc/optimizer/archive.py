"""The optimizer's state in a file: the numbers by position, and what each of them is for.

Keras stores optimizer variables by position. Beside them stands a layout in JSON, by which a
later version finds out what it has before it.
"""

import dataclasses
import json
from collections.abc import Iterable, Sequence
from typing import Any

import keras
import numpy as np

from keras_kfc.curvature.block_diagonal import BlockDiagonal

_LAYOUT = "layout"
# Of the stored state; to be raised when its layout changes, with a way to read the older ones.
FORMAT_VERSION = 3
# Endings of names of variables that belong to no block.
_ROLES = ("second_moment", "momentum", "average", "gradient_accumulator")
# What these were called in format 1.
_FORMER_ROLES = {
    "polyak_scaling": "polyak",
    "rejected_factor_updates": "skipped_factor_updates",
    "rejected_inverse_updates": "skipped_inverse_updates",
}


@dataclasses.dataclass(frozen=True)
class StoredState:
    """Variables of an optimizer as they were stored.

    Args:
        arrays: Their values, by position.
        roles: What each variable was for.
        blocks: For each curvature block a mapping with `path`, `structure`, `kernel`, `bias`
            (both indices), `shapes`, those of its factors, and from format 3 on `weight_sharing`,
            the setting in which they were measured (None for a structure without one).
        built: Whether the optimizer had been built.
        left_out: Indices of kernels without a block for want of statistics.
        version: Of the format that they were stored in.
    """

    arrays: Sequence[np.ndarray]
    roles: list[str]
    blocks: list[dict[str, Any]]
    built: bool
    left_out: Sequence[int] = ()
    version: int = FORMAT_VERSION

    def named(self, roles: Sequence[str]) -> list[str]:
        """Roles as this state names them."""
        if self.version >= 2:
            return list(roles)
        endings = ("omega_inverse", "gamma_inverse", "omega", "gamma", "weight", "inverted")
        abridged = (_abridged(role, (*endings, *_ROLES)) for role in roles)
        return [_FORMER_ROLES.get(role, role) for role in abridged]


def write_state(store: Any, state: StoredState) -> None:
    """Writes state into Keras's store, a mapping from names to arrays."""
    for index, array in enumerate(state.arrays):
        store[str(index)] = array
    names = ("built", "roles", "blocks", "left_out")
    layout = {"version": FORMAT_VERSION, **{name: getattr(state, name) for name in names}}
    store[_LAYOUT] = np.frombuffer(json.dumps(layout).encode(), "uint8")


def read_state(store: Any, name: str) -> StoredState | None:
    """Reads state of this format or an older one.

    Args:
        store: Keras's store.
        name: Name of the optimizer, for messages.

    Returns:
        The state, or None if the store holds that of another optimizer.

    Raises:
        ValueError: If the state has a newer format than this version reads.
    """
    keys = list(store.keys())
    if _LAYOUT not in keys:
        return None
    arrays = {key: np.asarray(store[key]) for key in keys}
    layout = json.loads(arrays.pop(_LAYOUT).tobytes())
    version = layout.pop("version", 0)
    if version > FORMAT_VERSION:
        raise ValueError(
            f"The stored state of optimizer '{name}' has a newer format than this version "
            f"of keras_kfc reads. Expected: at most {FORMAT_VERSION}. Received: {version}. "
            "Install the version of keras_kfc that stored it, or a newer one."
        )
    if version < 2:
        # There was one structure, and blocks were lists.
        layout["blocks"] = [
            dict(path=path, structure="kronecker", kernel=kernel, bias=bias, shapes=shapes)
            for path, kernel, bias, *shapes in layout["blocks"]
        ]
    return StoredState([arrays[str(i)] for i in range(len(arrays))], **layout, version=version)


def describe_blocks(curvature: BlockDiagonal | None) -> list[dict[str, Any]]:
    """What `StoredState.blocks` says of a curvature."""
    if curvature is None:
        return []
    return [
        {
            "path": block.path,
            "structure": curvature.structure_of(block),
            "kernel": block.kernel_index,
            "bias": block.indices.bias,
            "shapes": [list(shape) for shape in block.layout.factor_shapes.values()],
            "weight_sharing": getattr(block.layout, "weight_sharing", None),
        }
        for block in curvature.blocks
    ]


def roles_of(variables: Iterable[keras.Variable], curvature: BlockDiagonal | None) -> list[str]:
    """What variables of an optimizer are for: their names without those of their layers."""
    blocks = () if curvature is None else curvature.blocks
    of_blocks = {id(v): role for block in blocks for role, v in block.state.items()}
    return [of_blocks.get(id(v)) or _abridged(v.name, _ROLES) for v in variables]


def _abridged(name: str, endings: Sequence[str]) -> str:
    """The ending of a name, or the name if it has none of them."""
    return next((ending for ending in endings if name.endswith(ending)), name)
