"""What test modules share: processes of their own, and data files."""

import gzip
import os
import pathlib
import struct
import subprocess
import sys


def run_python(program, *arguments):
    """Runs a program in a process of its own, which can import the modules beside this one."""
    return subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(pathlib.Path(__file__).parent)},
        capture_output=True,
        text=True,
    )


def write_idx(path, array, kind=8):
    """Writes an IDX file of bytes, as the makers of MNIST define it."""
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, kind, array.ndim, *array.shape)
    with gzip.open(path, "wb") as stream:
        stream.write(header + array.astype("uint8").tobytes())
