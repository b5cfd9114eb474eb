"""What the optimizer's variables take, layer by layer."""

import dataclasses
import io
import math
from collections.abc import Iterable, Sequence
from typing import Any

import tensorflow as tf
from rich.console import Console
from rich.table import Table

from keras_kfc.curvature.layout import Partition, factor_dtype, partition_of
from keras_kfc.layers.instrumented import blocks_among
from keras_kfc.utils.texts import bytes_text

BlockPlan = tuple[str, Partition, int, int | None]


@dataclasses.dataclass(frozen=True)
class LayerMemory:
    """What the optimizer keeps for one layer.

    Args:
        path: The layer's path.
        omega: Shape of its input factor `(blocks, n, n)`, or None if it has no Kronecker block.
        gamma: Likewise of its output factor.
        factors: Bytes of both factors.
        inverses: Bytes of their damped inverses.
        momenta: Bytes of momenta and of all else that Keras keeps for its weights
            (moving averages, accumulated gradients).
    """

    path: str
    omega: tuple[int, int, int] | None
    gamma: tuple[int, int, int] | None
    factors: int
    inverses: int
    momenta: int

    @property
    def total(self) -> int:
        """All bytes of the layer."""
        return self.factors + self.inverses + self.momenta


class MemoryUsage:
    """What an optimizer's variables take; prints as a table.

    Args:
        entries: One `LayerMemory` for each layer.
        others: Bytes of variables that belong to no layer, such as counters.

    Attributes:
        entries: As given.
        others: As given.
    """

    def __init__(self, entries: Iterable[LayerMemory], others: int):
        self.entries = tuple(entries)
        self.others = others

    @property
    def total(self) -> int:
        """All bytes."""
        return sum(entry.total for entry in self.entries) + self.others

    def __str__(self) -> str:
        table = Table(title="Memory of the optimizer")
        headings = ("layer", "Ω", "Γ", "factors", "inverses", "momenta", "total")
        for heading in headings:
            table.add_column(heading, justify="left" if heading == "layer" else "right")
        for entry in self.entries:
            sizes = (entry.factors, entry.inverses, entry.momenta, entry.total)
            shapes = (_shape_text(entry.omega), _shape_text(entry.gamma))
            table.add_row(entry.path, *shapes, *map(bytes_text, sizes))
        table.caption = f"{bytes_text(self.total)} altogether"
        output = io.StringIO()
        Console(file=output, width=140).print(table)
        return output.getvalue().rstrip()

    __repr__ = __str__


def planned_blocks(variables: Any, max_factor_dim: int | None) -> list[BlockPlan]:
    """The blocks that an optimizer would have for some trainable variables.

    Args:
        variables: The trainable variables.
        max_factor_dim: As of `keras_kfc.KFC`.

    Returns:
        Path, layout, index of the kernel, and index of the bias or None, for each.

    Raises:
        ValueError: If `variables` is None.
        TypeError: If it is not a list.
    """
    if variables is None:
        raise ValueError(
            "Argument `variables` is needed before the optimizer is built, for example "
            "`optimizer.memory_usage(model.trainable_variables)`. Received: variables=None"
        )
    if not isinstance(variables, (list, tuple)):
        raise TypeError(
            "Argument `variables` must be a list of variables, for example "
            f"`model.trainable_variables`. Received: variables={variables!r} of type "
            f"{type(variables).__name__}"
        )
    return [
        (
            layer.path,
            partition_of(layer.linear_map, bias is not None, max_factor_dim),
            index,
            bias,
        )
        for index, layer, bias in blocks_among(variables)
    ]


def memory_of(
    variables: Sequence[Any], blocks: Iterable[BlockPlan], copies: int, others: Iterable[Any]
) -> MemoryUsage:
    """What an optimizer takes for some trainable variables.

    Args:
        variables: The trainable variables.
        blocks: The blocks among them, as of `planned_blocks`.
        copies: Number of copies of all variables that Keras keeps for its own purposes.
        others: The optimizer's variables that belong to none of these.

    Returns:
        A `MemoryUsage` with an entry for each Kronecker block, then one for each other layer.
    """
    entries = []
    covered: set[int] = set()
    for path, partition, index, bias in blocks:
        shapes = (partition.omega_shape, partition.gamma_shape)
        dtype = factor_dtype(variables[index])
        factors = sum(_bytes_of(shape, dtype) for shape in shapes)
        # A block's two scalars count with its factors.
        scalars = _bytes_of((2,), dtype)
        indices = {index} if bias is None else {index, bias}
        covered |= indices
        momenta = sum(_bytes_of(variables[i].shape, variables[i].dtype) for i in indices)
        entries.append(
            LayerMemory(path, *shapes, factors + scalars, factors, (1 + copies) * momenta)
        )
    fallback: dict[str, int] = {}
    for index, variable in enumerate(variables):
        if index not in covered:
            path = getattr(variable, "path", variable.name).rpartition("/")[0]
            size = (2 + copies) * _bytes_of(variable.shape, variable.dtype)
            fallback[path] = fallback.get(path, 0) + size
    entries += [LayerMemory(path, None, None, 0, 0, size) for path, size in fallback.items()]
    # The mean square of each block's step, and the weight of these means.
    lengths = _bytes_of((len(variables) + 1,), "float32")
    return MemoryUsage(entries, lengths + sum(_bytes_of(v.shape, v.dtype) for v in others))


def _bytes_of(shape: Iterable[int], dtype: Any) -> int:
    return math.prod(shape) * tf.as_dtype(dtype).size


def _shape_text(shape: tuple[int, int, int] | None) -> str:
    if shape is None:
        return "none"
    count, rows, _ = shape
    return f"{rows} x {rows}" if count == 1 else f"{count} of {rows} x {rows}"


def usage_of(optimizer: Any, variables: Any = None) -> MemoryUsage:
    """What an optimizer's variables take, or would take once it is built.

    Args:
        optimizer: The `keras_kfc.KFC`.
        variables: The trainable variables of the model, while the optimizer is not built.
    """
    if optimizer.built:
        variables = optimizer._trainable_variables
        parts = [(b.path, b.partition, b.kernel, b.bias) for b in optimizer.blocks]
    else:
        parts = planned_blocks(variables, optimizer.max_factor_dim)
    copies = int(optimizer.use_ema) + bool(optimizer.gradient_accumulation_steps)
    before = optimizer._before_build
    own = (v for v in optimizer.variables if not optimizer.built or id(v) in before)
    return memory_of(variables, parts, copies, own)
