"""How much is added to the diagonals of two Kronecker factors (factored Tikhonov damping).

A *block* is a pair of factors (omega, gamma) that stands for `omega ⊗ gamma`, with a pair for each
of its groups. Source: Martens & Grosse (2015), section 6.3.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf


class BlockShape(NamedTuple):
    """Sizes of a block, whatever parts its factors are cut into and filled up to.

    Args:
        groups: G.
        rows: Rows of the weights with bias of each group, n.
        columns: Its columns, m.
    """

    groups: int
    rows: int
    columns: int


def equal_shapes(factors: Sequence[tf.Tensor]) -> list[list[int]]:
    """Positions of the factors of each size and dtype."""
    positions: dict[Any, list[int]] = {}
    for number, factor in enumerate(factors):
        positions.setdefault((factor.shape[-1], factor.dtype), []).append(number)
    return list(positions.values())


def traces(factors: Sequence[tf.Tensor], groups: Sequence[int]) -> tf.Tensor:
    """Trace of the factor of each group of each block, `(Σ G,)`.

    Args:
        factors: Factors, each `(G * P, n, n)`.
        groups: G of each.
    """
    # Those of one size as one stack. Numbers of float64 blocks keep their precision.
    dtype = max((factor.dtype for factor in factors), key=lambda dtype: dtype.size)
    members = equal_shapes(factors)
    stacks = [concat([factors[number] for number in own]) for own in members]
    parts = concat([tf.cast(tf.linalg.trace(stack), dtype) for stack in stacks])
    order = [number for own in members for number in own]
    ends = np.cumsum([factors[number].shape[0] for number in order])
    places = {
        number: np.arange(end - factors[number].shape[0], end).reshape(groups[number], -1)
        for number, end in zip(order, ends, strict=True)
    }
    return sums_of(parts, [group for number in range(len(factors)) for group in places[number]])


def sums_of(values: tf.Tensor, places: Sequence[np.ndarray]) -> tf.Tensor:
    """Sums of some entries of a vector each, `(sums,)`.

    A sum by segments would add in any order on a GPU, and workers would part by its rounding.

    Args:
        values: The vector.
        places: For each sum the positions of its entries, at least one.
    """
    widest = max(len(own) for own in places)
    if widest == 1:
        return tf.gather(values, np.concatenate(places))
    index = np.full((len(places), widest), values.shape[0])
    for row, own in zip(index, places, strict=True):
        row[: len(own)] = own
    filled = tf.concat((values, tf.zeros((1,), values.dtype)), axis=0)
    return tf.reduce_sum(tf.gather(filled, index), axis=1)


def block_damping(
    omega_mean: tf.Tensor,
    gamma_mean: tf.Tensor,
    damping: tf.Tensor,
    network_mean: tf.Tensor | None,
) -> tuple[tf.Tensor, tf.Tensor]:
    """Splits damping between the two factors of blocks (factored Tikhonov).

    With `λ` added to the eigenvalues of `omega ⊗ gamma`, the factors get
    `π √λ` and `√λ / π`, where `π² = (tr omega / n) / (tr gamma / m)`:
    Martens & Grosse (2015), section 6.3.

    Args:
        omega_mean: Mean eigenvalue of the omega of each block, `tr omega / n`, an entry for
            each group of a block with groups.
        gamma_mean: That of its gamma, `tr gamma / m`, likewise.
        damping: Scalar, at least 0. The paper's absolute `λ`, if
            `network_mean` is None; otherwise a multiple of the block's own
            mean eigenvalue `(tr omega / n)(tr gamma / m)`, so that scaling
            either factor scales its damping with it.
        network_mean: Mean eigenvalue of the whole network's Fisher matrix, a
            scalar. It stands in for a block whose own mean eigenvalue is zero
            (a dead layer) when damping is relative.

    Returns:
        `(omega_shift, gamma_shift)`, likewise: what to add to the diagonals. Where a trace is
        zero and damping is absolute, `π = 1`.
    """
    root = tf.sqrt(tf.cast(damping, omega_mean.dtype))
    omega_alive, gamma_alive = omega_mean > 0, gamma_mean > 0
    if network_mean is None:
        alive = omega_alive & gamma_alive
        ratio = tf.where(alive, omega_mean, 1.0) / tf.where(alive, gamma_mean, 1.0)
        pi = tf.sqrt(ratio)
        return pi * root, root / pi
    network_mean = tf.cast(network_mean, omega_mean.dtype)
    instead = tf.where(gamma_alive, tf.math.divide_no_nan(network_mean, gamma_mean), 1.0)
    omega_mean = tf.where(omega_alive, omega_mean, instead)
    gamma_mean = tf.where(gamma_alive, gamma_mean, network_mean / omega_mean)
    return root * omega_mean, root * gamma_mean


class BlockTraces(NamedTuple):
    """Traces of the factors of some blocks, an entry for each group of each block.

    Args:
        omega: `(Σ G,)`.
        gamma: Likewise.
        shapes: Sizes of each block.
    """

    omega: tf.Tensor
    gamma: tf.Tensor
    shapes: tuple[BlockShape, ...]

    @property
    def total(self) -> tf.Tensor:
        """Trace of the block-diagonal Fisher matrix that they make, a scalar."""
        return tf.tensordot(self.omega, self.gamma, 1)

    @property
    def size(self) -> float:
        """Number of its rows."""
        return float(self.per_group("rows") @ self.per_group("columns"))

    def per_group(self, field: str) -> np.ndarray:
        """Rows or columns of each group of each block, `(Σ G,)`."""
        sizes = [getattr(shape, field) for shape in self.shapes]
        return np.repeat(sizes, [shape.groups for shape in self.shapes])


def block_traces(
    omegas: Sequence[tf.Tensor], gammas: Sequence[tf.Tensor], shapes: Sequence[BlockShape]
) -> BlockTraces:
    """Traces of all factors.

    Args:
        omegas: Input factors, each `(G * P, n, n)`.
        gammas: Output factors, each `(G * Q, m, m)`.
        shapes: Sizes of each block.
    """
    groups = [shape.groups for shape in shapes]
    omega, gamma = tf.split(traces([*omegas, *gammas], groups * 2), 2)
    return BlockTraces(omega, gamma, tuple(shapes))


def with_unit_traces(
    gammas: Sequence[tf.Tensor], block_traces: BlockTraces, chosen: Sequence[bool]
) -> tuple[list[tf.Tensor], BlockTraces]:
    """Divides the output factors of some blocks by their trace, for each group.

    Args:
        gammas: Output factors, each `(G * Q, m, m)`.
        block_traces: Traces of all factors.
        chosen: Which blocks.

    Returns:
        The output factors and the traces of all; a factor of zeros stays.
    """
    if not any(chosen):
        return list(gammas), block_traces
    groups = [shape.groups for shape in block_traces.shapes]
    divided = np.repeat(chosen, groups)
    scales = tf.where(divided & (block_traces.gamma > 0), block_traces.gamma, 1.0)
    places = [
        np.repeat(np.arange(end - count, end), gamma.shape[0] // count)
        for gamma, count, end in zip(gammas, groups, np.cumsum(groups), strict=True)
    ]
    counts = [len(place) for place in places]
    each = tf.split(tf.gather(scales, np.concatenate(places))[:, None, None], counts)
    scaled = [
        gamma / tf.cast(scale, gamma.dtype) if taken else gamma
        for gamma, scale, taken in zip(gammas, each, chosen, strict=True)
    ]
    return scaled, block_traces._replace(gamma=block_traces.gamma / scales)


def shifts_of(
    omegas: Sequence[tf.Tensor],
    gammas: Sequence[tf.Tensor],
    block_traces: BlockTraces,
    damping: tf.Tensor,
    network_mean: tf.Tensor | None,
) -> list[tf.Tensor]:
    """What to add to the diagonals of all omegas, then of all gammas, a list of `(G * P,)`.

    Parts of a factor that was cut into diagonal blocks get the same.

    Args:
        omegas: Input factors.
        gammas: Output factors.
        block_traces: Their traces.
        damping: As in `block_damping`.
        network_mean: Likewise.
    """
    numpy_dtype = block_traces.omega.dtype.as_numpy_dtype
    shifts = block_damping(
        block_traces.omega / block_traces.per_group("rows").astype(numpy_dtype),
        block_traces.gamma / block_traces.per_group("columns").astype(numpy_dtype),
        damping,
        network_mean,
    )
    groups = [shape.groups for shape in block_traces.shapes]
    all_shifts: list[tf.Tensor] = []
    for factors, shift in zip((omegas, gammas), shifts, strict=True):
        counts = [factor.shape[0] for factor in factors]
        if counts != groups:
            # One operation for all, since those of each block add up to much of a first step.
            parts = [c // g for c, g in zip(counts, groups, strict=True)]
            shift = tf.gather(shift, np.repeat(np.arange(sum(groups)), np.repeat(parts, groups)))
        for factor, part in zip(factors, tf.split(shift, counts), strict=True):
            all_shifts.append(tf.cast(part, factor.dtype))
    return all_shifts


def concat(tensors: list[Any]) -> tf.Tensor:
    """Joins tensors along the first axis."""
    return tf.concat(tensors, axis=0) if len(tensors) > 1 else tensors[0]
