"""Damped inverses of the factors of a whole network, those of one size as one stack."""

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from keras_kfc.linalg.damping import BlockShape, BlockTraces, concat, shifts_of
from keras_kfc.linalg.inverse import damped_inverse


def invert_blocks(
    omegas: Sequence[tf.Tensor],
    gammas: Sequence[tf.Tensor],
    traces: BlockTraces,
    damping: tf.Tensor,
    network_mean: tf.Tensor | None,
) -> tuple[list[tf.Tensor], list[tf.Tensor]]:
    """Damped inverses of both factors of all blocks of a network.

    Compiled by XLA where a GPU is present, or where the caller is; on a CPU TensorFlow's
    own kernels compute the same faster.

    Args:
        omegas: Input factors, each `(G * P, n, n)`.
        gammas: Output factors, each `(G * Q, m, m)`.
        traces: Their traces, `keras_kfc.linalg.damping.block_traces`.
        damping: Scalar; see `keras_kfc.linalg.damping.block_damping`.
        network_mean: Likewise: a scalar, or None for absolute damping.

    Returns:
        Inverses of the damped omegas and gammas, in the given order. Those that
        could not be computed hold NaN.
    """
    compiled = bool(tf.config.list_logical_devices("GPU"))
    function = _invert_all_xla if compiled else _invert_all
    return function(
        list(omegas),
        list(gammas),
        traces.omega,
        traces.gamma,
        traces.shapes,
        damping,
        network_mean,
    )


def _invert_all(
    omegas: Sequence[tf.Tensor],
    gammas: Sequence[tf.Tensor],
    omega_traces: tf.Tensor,
    gamma_traces: tf.Tensor,
    shapes: tuple[BlockShape, ...],
    damping: tf.Tensor,
    network_mean: tf.Tensor | None,
) -> tuple[list[tf.Tensor], list[tf.Tensor]]:
    factors = [*omegas, *gammas]
    shifts = shifts_of(
        omegas, gammas, BlockTraces(omega_traces, gamma_traces, shapes), damping, network_mean
    )
    inverses: list[Any] = [None] * len(factors)
    for members in _equal_shapes(factors).values():
        stack = concat([factors[number] for number in members])
        shift = concat([shifts[number] for number in members])
        parts = [damped_inverse(stack, shift)]
        if len(members) > 1:
            parts = tf.split(parts[0], [factors[number].shape[0] for number in members])
        for number, part in zip(members, parts, strict=True):
            inverses[number] = part
    return inverses[: len(omegas)], inverses[len(omegas) :]


_invert_all_xla = tf.function(_invert_all, autograph=False, jit_compile=True)


def _equal_shapes(factors: Sequence[tf.Tensor]) -> dict[Any, list[int]]:
    """Positions of the factors of each size and dtype."""
    positions: dict[Any, list[int]] = {}
    for number, factor in enumerate(factors):
        positions.setdefault((factor.shape[-1], factor.dtype), []).append(number)
    return positions
