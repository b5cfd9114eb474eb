"""Damped inverses of Kronecker factors: of single sizes, and of all blocks of a network.

Run as `python -m benchmarks.inverse`; `--help` lists the options. What is compared runs
in turns, and medians are shown; errors are against float64.
"""

import argparse
from typing import Any

import numpy as np
import tensorflow as tf

from benchmarks.harness import interleaved, report
from benchmarks.step import NETS
from keras_kfc import instrument
from keras_kfc.curvature.layout import layout_of
from keras_kfc.layers.instrumented import KroneckerLayer
from keras_kfc.linalg.damping import block_traces
from keras_kfc.linalg.inverse import damped_inverse
from keras_kfc.linalg.stacks import invert_blocks

SIZES = (65, 145, 289, 401, 577, 801, 1001)
# In units of the mean eigenvalue: KFC's default, and a small one.
SHIFTS = (0.45, 3e-3)


def factor(size: int, count: int = 1) -> tf.Tensor:
    """Second moments with a quickly falling spectrum, of mean eigenvalue 1."""
    root = np.random.default_rng(size).normal(size=(count, size, size // 2 + 1))
    root /= np.arange(1, size // 2 + 2) ** 0.5
    matrix = root @ root.transpose(0, 2, 1)
    matrix *= size / np.trace(matrix, axis1=1, axis2=2)[:, None, None]
    return tf.constant(matrix.astype("float32"))


def by_lu(matrix: tf.Tensor, shift: tf.Tensor) -> tf.Tensor:
    """`tf.linalg.inv`: LU decomposition with TensorFlow, QR decomposition with XLA."""
    return tf.linalg.inv(matrix + shift[:, None, None] * tf.eye(matrix.shape[-1]))


def by_whole_cholesky(matrix: tf.Tensor, shift: tf.Tensor) -> tf.Tensor:
    """One Cholesky decomposition, a triangular solve and a product."""
    identity = tf.eye(matrix.shape[-1], batch_shape=matrix.shape[:1])
    decomposition = tf.linalg.cholesky(matrix + shift[:, None, None] * identity)
    root = tf.linalg.triangular_solve(decomposition, identity)
    return tf.matmul(root, root, transpose_a=True)


def measure_size(size: int, shift: float, repeats: int) -> dict[str, Any]:
    """One size of a factor, with TensorFlow's kernels and with XLA."""
    matrix, shifts = factor(size), tf.constant([shift])
    expected = np.linalg.inv(matrix[0].numpy().astype("float64") + shift * np.eye(size))
    functions = {"LU": by_lu, "Cholesky": by_whole_cholesky, "ours": damped_inverse}
    calls: dict[str, Any] = {}
    for compiled in (False, True):
        for name, function in functions.items():
            graph = tf.function(function, autograph=False, jit_compile=compiled)
            label = f"{name} XLA" if compiled else name
            calls[label] = lambda graph=graph: graph(matrix, shifts).numpy()
    row: dict[str, Any] = {"rows": size, "damping": shift}
    row |= {f"{name} ms": 1e3 * value for name, value in interleaved(calls, repeats).items()}
    for name in ("LU", "ours"):
        error = np.linalg.norm(calls[name]()[0] - expected) / np.linalg.norm(expected)
        row[f"{name} error"] = float(error)
    return row


def inverses(omegas: list[Any], gammas: list[Any], shapes: list[Any]) -> Any:
    """Inverses of blocks at KFC's default damping."""
    traces = block_traces(omegas, gammas, shapes)
    return invert_blocks(omegas, gammas, traces, 0.2, traces.total / traces.size)


def measure_net(name: str, repeats: int) -> dict[str, Any]:
    """All blocks of a network: one stack for each size of factor, or each factor alone."""
    model = instrument(NETS[name]())
    layers: list[Any] = [layer for layer in model.layers if isinstance(layer, KroneckerLayer)]
    partitions = [layout_of(layer.linear_map, layer.bias is not None, None) for layer in layers]
    omegas = [factor(part.omega_shape[1], part.omega_shape[0]) for part in partitions]
    gammas = [factor(part.gamma_shape[1], part.gamma_shape[0]) for part in partitions]
    shapes = [part.block_shape for part in partitions]

    def alone(omegas, gammas):
        results = [
            inverses([omega], [gamma], [shape])
            for omega, gamma, shape in zip(omegas, gammas, shapes, strict=True)
        ]
        return results, []

    def together(omegas, gammas):
        return inverses(omegas, gammas, shapes)

    calls = {}
    for label, function, compiled in (
        ("alone", alone, False),
        ("stacks", together, False),
        ("stacks XLA", together, True),
    ):
        graph = tf.function(function, autograph=False, jit_compile=compiled)
        calls[label] = lambda graph=graph: tf.nest.map_structure(
            lambda part: part.numpy(), graph(omegas, gammas)
        )
    sizes = [part.shape[-1] for part in (*omegas, *gammas)]
    row: dict[str, Any] = {"net": name, "factors": len(sizes), "sizes": len(set(sizes))}
    return row | {f"{name} ms": 1e3 * value for name, value in interleaved(calls, repeats).items()}


def main() -> None:
    """Runs the measurements."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES))
    arguments = parser.parse_args()
    rows = [
        measure_size(size, shift, arguments.repeats) for size in arguments.sizes for shift in SHIFTS
    ]
    report("inverse", "Damped inverse of one factor", rows, repeats=arguments.repeats)
    nets = [measure_net(name, arguments.repeats) for name in NETS]
    report("inverse-nets", "All blocks of a network", nets, repeats=arguments.repeats)


if __name__ == "__main__":
    main()
