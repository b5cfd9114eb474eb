"""Inverses shared out among replicas: each computes its part of them, and all exchange theirs.

The time of a renewal is then that of the largest share and of the exchange, of half of each
symmetric matrix. Which matrix is whose follows from their sizes alone, so that nobody has to ask.
"""

import collections
import dataclasses
from collections.abc import Callable, Sequence

import tensorflow as tf

from keras_kfc.placement.api import Placement
from keras_kfc.placement.packing import pack, unpack

Invert = Callable[[Sequence[tf.Tensor], Sequence[tf.Tensor]], list[tf.Tensor]]
# Products of an inversion below which it takes less time than an exchange between processes: some
# thousandths of a second.
_FEWEST_PRODUCTS = 1e8


@dataclasses.dataclass(frozen=True)
class Share:
    """What one replica inverts.

    Args:
        starts: For each stack the number of its first matrix that is inverted here.
        shapes: Of the parts of the stacks, some of them of no matrix.
    """

    starts: Sequence[int]
    shapes: Sequence[tuple[int, int, int]]

    @property
    def length(self) -> int:
        """Number of entries of the upper triangles."""
        return sum(count * size * (size + 1) // 2 for count, size, _ in self.shapes)


def shares_of(shapes: Sequence[tuple[int, int, int]], replicas: int) -> list[Share]:
    """Shares out stacks of matrices by the products that their inverses take.

    Args:
        shapes: Shapes of the stacks, each `(G, n, n)`.
        replicas: Number of replicas.
    """
    matrices = [stack for stack, (count, _, _) in enumerate(shapes) for _ in range(count)]
    costs = [float(shapes[stack][1]) ** 3 for stack in matrices]
    shares = []
    starts = [0] * len(shapes)
    for own in evenly(costs, replicas):
        # Which matrices of a stack are whose makes no difference: those of one replica follow one
        # another, so that nothing has to be sorted.
        counts = collections.Counter(matrices[place] for place in own)
        parts = [(counts[stack], *shape[1:]) for stack, shape in enumerate(shapes)]
        shares.append(Share(tuple(starts), parts))
        starts = [start + part[0] for start, part in zip(starts, parts, strict=True)]
    return shares


def evenly(costs: Sequence[float], replicas: int) -> list[list[int]]:
    """Shares out pieces of work: the dearest first, each to the replica that has least to do.

    Args:
        costs: What each piece takes.
        replicas: Number of replicas.

    Returns:
        For each replica the numbers of its pieces.
    """
    loads = [0.0] * replicas
    shares: list[list[int]] = [[] for _ in range(replicas)]
    for number in sorted(range(len(costs)), key=lambda number: -costs[number]):
        replica = loads.index(min(loads))
        loads[replica] += costs[number]
        shares[replica].append(number)
    return shares


def spread(
    placement: Placement,
    invert: Invert,
    stacks: Sequence[tf.Tensor],
    shifts: Sequence[tf.Tensor],
) -> list[tf.Tensor]:
    """Inverts stacks of matrices, each replica its share; in cross-replica context.

    Args:
        placement: Where the replicas are.
        invert: What inverts on one of them.
        stacks: Stacks of symmetric matrices, each `(G, n, n)`.
        shifts: For each of them what is added to the diagonals, `(G,)`.
    """
    products = sum(stack.shape[0] * stack.shape[1] ** 3 for stack in stacks)
    if placement.count == 1 or products < _FEWEST_PRODUCTS:
        return invert(stacks, shifts)
    inverses: dict[int, tf.Tensor] = {}
    for dtype in {stack.dtype: None for stack in stacks}:
        own = [number for number, stack in enumerate(stacks) if stack.dtype == dtype]
        found = _spread_one_dtype(
            placement, invert, [stacks[number] for number in own], [shifts[i] for i in own]
        )
        inverses.update(zip(own, found, strict=True))
    return [inverses[number] for number in range(len(stacks))]


def _spread_one_dtype(
    placement: Placement,
    invert: Invert,
    stacks: Sequence[tf.Tensor],
    shifts: Sequence[tf.Tensor],
) -> list[tf.Tensor]:
    shapes = [tuple(stack.shape) for stack in stacks]
    shares = shares_of(shapes, placement.count)
    longest = max(share.length for share in shares)
    parts = []
    for replica, device in zip(placement.numbers, placement.devices, strict=True):
        share = shares[replica]
        used = [stack for stack, (count, _, _) in enumerate(share.shapes) if count]
        places = {
            stack: slice(share.starts[stack], share.starts[stack] + share.shapes[stack][0])
            for stack in used
        }
        with tf.device(device):
            found = invert(
                [stacks[stack][places[stack]] for stack in used],
                [shifts[stack][places[stack]] for stack in used],
            )
            row = tf.zeros((0,), stacks[0].dtype)
            if used:
                row = pack(found, [True] * len(used))
            parts.append(tf.pad(row, ((0, longest - share.length),)))
    rows = tf.unstack(placement.gather_parts(parts), placement.count)
    of_replicas = [
        unpack(row[: share.length], share.shapes, [True] * len(shapes))
        for row, share in zip(rows, shares, strict=True)
    ]
    return [tf.concat(parts_of_one, axis=0) for parts_of_one in zip(*of_replicas, strict=True)]
