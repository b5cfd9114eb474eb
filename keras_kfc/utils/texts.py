"""Names and numbers as people read them."""

import itertools
from collections.abc import Container


def unused_name(path: str, taken: Container[str]) -> str:
    """A path itself, or with a number where another layer has the same.

    Args:
        path: The path.
        taken: The names that are in use.
    """
    names = itertools.chain([path], (f"{path}_{number}" for number in itertools.count(1)))
    return next(name for name in names if name not in taken)


def bytes_text(count: int) -> str:
    """A number of bytes for people, in units of 1024."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"


def inversion_costs_text(shape: tuple[int, int, int]) -> str:
    """What a stack of symmetric matrices and their inverses take, and the products of inverting.

    Args:
        shape: `(matrices, rows, rows)`.
    """
    count, rows, _ = shape
    return f"{bytes_text(8 * count * rows**2)}, {count * rows**3:.1e} products"
