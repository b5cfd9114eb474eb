"""Which rule trains each layer of a model, as a table."""

import dataclasses
import io
from collections.abc import Iterable

from rich.console import Console
from rich.table import Table


@dataclasses.dataclass(frozen=True)
class LayerCoverage:
    """How KFC trains one layer.

    Args:
        path: The layer's path.
        kind: Name of its class.
        parameters: Number of its trainable parameters, or None if it is not built.
        covered: Whether it has a block of the curvature.
        reason: Why not, or an empty string.
    """

    path: str
    kind: str
    parameters: int | None
    covered: bool
    reason: str


class Coverage:
    """Which layers of a model have a block of the curvature; prints as a table.

    Args:
        entries: One `LayerCoverage` for each layer with trainable weights.

    Attributes:
        entries: As given.
    """

    def __init__(self, entries: Iterable[LayerCoverage]):
        self.entries = tuple(entries)

    @property
    def covered(self) -> list[str]:
        """Paths of the layers that have a block."""
        return [entry.path for entry in self.entries if entry.covered]

    @property
    def fallback(self) -> dict[str, str]:
        """Paths of the layers that the fallback rule trains, with the reason."""
        return {entry.path: entry.reason for entry in self.entries if not entry.covered}

    def __str__(self) -> str:
        table = Table(title="KFC coverage")
        for heading in ("layer", "class", "parameters", "trained by"):
            table.add_column(heading, justify="right" if heading == "parameters" else "left")
        for entry in self.entries:
            count = "?" if entry.parameters is None else f"{entry.parameters:,}"
            rule = "block" if entry.covered else f"fallback rule: {entry.reason}"
            table.add_row(entry.path, entry.kind, count, rule)
        sizes = [(entry.covered, entry.parameters or 0) for entry in self.entries]
        share = sum(size for covered, size in sizes if covered) / max(1, sum(s for _, s in sizes))
        table.caption = (
            f"{len(self.covered)} of {len(self.entries)} layers and {share:.1%} of the parameters "
            "have a block"
        )
        output = io.StringIO()
        Console(file=output, width=140).print(table)
        return output.getvalue().rstrip()

    __repr__ = __str__
