"""What test modules share: processes of their own, data files, and the norm of a step."""

import gzip
import os
import pathlib
import struct
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf

from keras_kfc.linalg.damping import block_traces
from keras_kfc.linalg.stacks import invert_blocks


def run_python(program, *arguments):
    """Runs a program in a process of its own, which can import all modules of the tests."""
    tests = pathlib.Path(__file__).parent
    folders = (str(folder) for folder in tests.iterdir() if folder.is_dir())
    return subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tests), *folders])},
        capture_output=True,
        text=True,
    )


def write_idx(path, array, kind=8):
    """Writes an IDX file of bytes, as the makers of MNIST define it."""
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, kind, array.ndim, *array.shape)
    with gzip.open(path, "wb") as stream:
        stream.write(header + array.astype("uint8").tobytes())


def squared_fisher_norm(block, step):
    """`vᵀ F v` of a step of kernel and bias, by a block's damped factors, in float64."""
    joint = block.layout.linear_map.stack_bias(*map(tf.constant, step))[0].numpy().astype("float64")
    omega, gamma = (
        np.linalg.inv(part[0].numpy().astype("float64"))
        for part in (block.omega_inverse, block.gamma_inverse)
    )
    return np.sum(joint * (omega @ joint @ gamma))


def inverses_of(omegas, gammas, shapes, damping, relative):
    """Damped inverses of both factors of some blocks that make a whole network."""
    traces = block_traces(omegas, gammas, shapes)
    network_mean = traces.total / traces.size if relative else None
    return invert_blocks(omegas, gammas, traces, tf.constant(damping), network_mean)


def few(cases, quick):
    """Cases of a test: the first few run with it, the others every night only.

    With none of them quick, the first is a slow test.
    """
    marks = [None] * quick + ([] if quick else [pytest.mark.slow])
    marks += [pytest.mark.nightly] * (len(cases) - len(marks))
    return [_marked(case, mark) if mark else case for case, mark in zip(cases, marks, strict=True)]


def _marked(case, mark):
    if hasattr(case, "marks"):
        return pytest.param(*case.values, marks=[*case.marks, mark], id=case.id)
    values = case if isinstance(case, tuple) else (case,)
    return pytest.param(*values, marks=mark)
