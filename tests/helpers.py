"""What test modules need that run programs in processes of their own."""

import os
import pathlib
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
