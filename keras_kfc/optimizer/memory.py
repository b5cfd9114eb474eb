"""What the optimizer's variables take, layer by layer."""

import dataclasses
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import tensorflow as tf
from rich.console import Console
from rich.table import Table

from keras_kfc.curvature.api import CurvatureBlock
from keras_kfc.curvature.choice import PlannedBlock, planned_blocks
from keras_kfc.linalg.precision import factor_dtype
from keras_kfc.utils.texts import bytes_text

_SYMBOLS = {"omega": "Ω", "gamma": "Γ"}


@dataclasses.dataclass(frozen=True)
class LayerMemory:
    """What the optimizer keeps for one layer.

    Args:
        path: The layer's path.
        shapes: Shapes of its factors by name, such as `(blocks, n, n)` for `"omega"` and
            `"gamma"`; empty if it has no block.
        factors: Bytes of the factors.
        inverses: Bytes of their damped inverses.
        momenta: Bytes of momenta and of all else that Keras keeps for its weights
            (moving averages, accumulated gradients).
    """

    path: str
    shapes: Mapping[str, tuple[int, ...]]
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

    Example:

    >>> model = keras.Sequential([keras.Input((3,)), keras_kfc.layers.Dense(2)])
    >>> usage = keras_kfc.KFC().memory_usage(model.trainable_variables)
    >>> usage.entries[0].shapes, usage.entries[0].inverses
    ({'omega': (1, 4, 4), 'gamma': (1, 2, 2)}, 80)
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
        headings = ("layer", "shapes", "factors", "inverses", "momenta", "total")
        for heading in headings:
            table.add_column(heading, justify="left" if heading == "layer" else "right")
        for entry in self.entries:
            sizes = (entry.factors, entry.inverses, entry.momenta, entry.total)
            table.add_row(entry.path, _shapes_text(entry.shapes), *map(bytes_text, sizes))
        table.caption = f"{bytes_text(self.total)} altogether"
        output = io.StringIO()
        Console(file=output, width=140).print(table)
        return output.getvalue().rstrip()

    __repr__ = __str__


def usage_of(optimizer: Any, variables: Any = None) -> MemoryUsage:
    """What an optimizer's variables take, or would take once it is built.

    Args:
        optimizer: The `keras_kfc.KFC`.
        variables: The trainable variables of the model, while the optimizer is not built.

    Raises:
        ValueError: If the optimizer is not built and `variables` is None.
        TypeError: If `variables` is not a list.
    """
    blocks: Iterable[PlannedBlock | CurvatureBlock] = optimizer.blocks
    own = optimizer.variables
    if optimizer.built:
        variables = optimizer.trained_variables
        own = [v for v in own if id(v) in optimizer.waiting.before_build]
    else:
        _check_variables(variables)
        blocks = planned_blocks(variables, optimizer.structure, optimizer.max_factor_dim)
    copies = int(optimizer.use_ema) + bool(optimizer.gradient_accumulation_steps)
    # The reduction ratio and its weight, see `keras_kfc.steps.levenberg_marquardt`.
    scalars = 2 if optimizer.step == "quadratic" else 0
    return memory_of(variables, blocks, copies, own, scalars)


def _check_variables(variables: Any) -> None:
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


def memory_of(
    variables: Sequence[Any],
    blocks: Iterable[PlannedBlock | CurvatureBlock],
    copies: int,
    others: Iterable[Any],
    scalars: int = 0,
) -> MemoryUsage:
    """What an optimizer takes for some trainable variables.

    Args:
        variables: The trainable variables.
        blocks: The blocks among them.
        copies: Number of copies of all variables that Keras keeps for its own purposes.
        others: The optimizer's variables that belong to none of these.
        scalars: Number of float32 scalars beside them.

    Returns:
        A `MemoryUsage` with an entry for each block, then one for each other layer.
    """
    entries = []
    covered: set[int] = set()
    for block in blocks:
        layout = block.layout
        dtype = factor_dtype(variables[block.kernel_index])
        factors = sum(_bytes_of(shape, dtype) for shape in layout.factor_shapes.values())
        # With eigenvectors, where a structure keeps them.
        computed = {**layout.inverse_shapes, **getattr(layout, "basis_shapes", {})}
        inverses = sum(_bytes_of(shape, dtype) for shape in computed.values())
        # A block's two scalars count with its factors.
        factors += _bytes_of((2,), dtype)
        own = block.indices.every
        covered |= set(own)
        momenta = sum(_bytes_of(variables[i].shape, variables[i].dtype) for i in own)
        momenta *= 1 + copies
        entries.append(LayerMemory(block.path, layout.factor_shapes, factors, inverses, momenta))
    fallback: dict[str, int] = {}
    for index, variable in enumerate(variables):
        if index not in covered:
            path = getattr(variable, "path", variable.name).rpartition("/")[0]
            size = (2 + copies) * _bytes_of(variable.shape, variable.dtype)
            fallback[path] = fallback.get(path, 0) + size
    entries += [LayerMemory(path, {}, 0, 0, size) for path, size in fallback.items()]
    # The mean square of each block's step, and the weight of these means.
    lengths = _bytes_of((len(variables) + 1 + scalars,), "float32")
    return MemoryUsage(entries, lengths + sum(_bytes_of(v.shape, v.dtype) for v in others))


def _bytes_of(shape: Iterable[int], dtype: Any) -> int:
    return math.prod(shape) * tf.as_dtype(dtype).size


def _shapes_text(shapes: Mapping[str, tuple[int, ...]]) -> str:
    return ", ".join(_shape_text(name, shape) for name, shape in shapes.items()) or "none"


def _shape_text(name: str, shape: tuple[int, ...]) -> str:
    count, *matrix = shape
    text = " x ".join(map(str, matrix))
    return f"{_SYMBOLS.get(name, name)} " + (text if count == 1 else f"{count} of {text}")
