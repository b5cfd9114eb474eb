"""Which blocks are inverted in the same step.

All inverses of a deep network at once would make a step that takes as long as several. After the
start, blocks take turns: groups of about equal cost, a step for each.
"""

from collections.abc import Sequence

from keras_kfc.curvature.api import CurvatureBlock

# Products that a step may spend on inverses without being told from its neighbours: some hundredths
# of a second of a processor with two cores.
_AT_ONCE = 1e9
# Each group is a branch of the step's graph.
MOST_GROUPS = 8


def turns(blocks: Sequence[CurvatureBlock], most: int = MOST_GROUPS) -> list[list[CurvatureBlock]]:
    """Groups of blocks, those with factors of a size together where that is possible.

    Args:
        blocks: The blocks.
        most: The most groups, at least 1.

    Returns:
        The groups: one for all blocks where they are cheap; no empty one.
    """
    costs = {id(block): _products(block) for block in blocks}
    total = sum(costs.values())
    count = max(1, min(most, MOST_GROUPS, round(total / _AT_ONCE)))
    groups: list[list[CurvatureBlock]] = [[] for _ in range(count)]
    spent = 0.0
    for block in sorted(blocks, key=lambda block: costs[id(block)]):
        # The group in which the middle of its cost falls.
        middle = spent + costs[id(block)] / 2
        groups[min(count - 1, int(count * middle / max(total, 1.0)))].append(block)
        spent += costs[id(block)]
    return [group for group in groups if group]


def _products(block: CurvatureBlock) -> float:
    """Products that the inversion of a block's factors takes."""
    layout = block.layout
    basis = getattr(layout, "basis_shapes", {})
    inverted = float(sum(s[0] * s[1] ** 3 for s in layout.inverse_shapes.values() if len(s) == 3))
    # Eigenvectors take some ten times as long as inverses.
    return inverted if not basis else 10.0 * sum(s[0] * s[1] ** 3 for s in basis.values())
