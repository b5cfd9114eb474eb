"""Damped inverses of the factors of a whole network, those of one size as one stack."""

from collections.abc import Sequence
from typing import Any, Protocol

import tensorflow as tf

from keras_kfc.linalg.damping import BlockTraces, concat, equal_shapes, shifts_of
from keras_kfc.linalg.inverse import damped_inverse


class Invert(Protocol):
    """Computes damped inverses."""

    def __call__(
        self, stacks: Sequence[tf.Tensor], shifts: Sequence[tf.Tensor], /
    ) -> list[tf.Tensor]:
        """Inverts each `A + shift I`.

        Args:
            stacks: Stacks of symmetric matrices, each `(G, n, n)`.
            shifts: For each stack `(G,)`.
        """


def invert_stacks(stacks: Sequence[tf.Tensor], shifts: Sequence[tf.Tensor]) -> list[tf.Tensor]:
    """Inverts each `A + shift I`, as `keras_kfc.linalg.inverse.damped_inverse` does.

    Compiled by XLA where a GPU is present, or where the caller is; on a CPU TensorFlow's
    own kernels compute the same faster.
    """
    compiled = bool(tf.config.list_logical_devices("GPU"))
    return (_invert_xla if compiled else _invert)(list(stacks), list(shifts))


def _invert(stacks: Sequence[tf.Tensor], shifts: Sequence[tf.Tensor]) -> list[tf.Tensor]:
    return [damped_inverse(*pair) for pair in zip(stacks, shifts, strict=True)]


_invert_xla = tf.function(_invert, autograph=False, jit_compile=True)


def invert_blocks(
    omegas: Sequence[tf.Tensor],
    gammas: Sequence[tf.Tensor],
    traces: BlockTraces,
    damping: tf.Tensor,
    network_mean: tf.Tensor | None,
    invert: Invert = invert_stacks,
) -> tuple[list[tf.Tensor], list[tf.Tensor]]:
    """Damped inverses of both factors of all blocks of a network.

    Args:
        omegas: Input factors, each `(G * P, n, n)`.
        gammas: Output factors, each `(G * Q, m, m)`.
        traces: Their traces, `keras_kfc.linalg.damping.block_traces`.
        damping: Scalar; see `keras_kfc.linalg.damping.block_damping`.
        network_mean: Likewise: a scalar, or None for absolute damping.
        invert: What inverts the stacks.

    Returns:
        Inverses of the damped omegas and gammas, in the given order. Those that
        could not be computed hold NaN.
    """
    factors = [*omegas, *gammas]
    shifts = shifts_of(omegas, gammas, traces, damping, network_mean)
    groups = equal_shapes(factors)
    stacks = invert(
        [concat([factors[number] for number in members]) for members in groups],
        [concat([shifts[number] for number in members]) for members in groups],
    )
    inverses: list[Any] = [None] * len(factors)
    for members, stack in zip(groups, stacks, strict=True):
        parts = [stack]
        if len(members) > 1:
            parts = tf.split(stack, [factors[number].shape[0] for number in members])
        for number, part in zip(members, parts, strict=True):
            inverses[number] = part
    return inverses[: len(omegas)], inverses[len(omegas) :]
