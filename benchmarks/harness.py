"""What the measurements share: interleaved timing, the machine's description, tables, JSON."""

import importlib.metadata
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

OUTPUT = pathlib.Path(__file__).parent / "output"


def interleaved(functions: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each function, run in turns so that drift hits all alike.

    Args:
        functions: Functions by name; each is run once before the first measurement.
        repeats: Number of turns.
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function()
    for _ in range(repeats):
        for name, function in functions.items():
            begin = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - begin)
    return {name: statistics.median(values) for name, values in seconds.items()}


def in_child_process(module: str, arguments: Sequence[str]) -> Any:
    """Runs `python -m module arguments` and returns the JSON of its last line of output."""
    command = [sys.executable, "-m", module, *arguments]
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
    finished = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, check=True, text=True
    )
    return json.loads(finished.stdout.splitlines()[-1])


def memory_of_process(field: str) -> int:
    """A field of this process's memory status in bytes, such as `VmRSS` or `VmHWM` (Linux)."""
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return 1024 * int(line.split()[1])
    raise ValueError(f"Argument `field` must be a field of /proc/self/status. Received: {field}")


def describe_machine() -> dict[str, Any]:
    """Processor, number of cores and versions."""
    processor = platform.processor() or platform.machine()
    information = pathlib.Path("/proc/cpuinfo")
    if information.exists():
        names = [line for line in information.read_text().splitlines() if "model name" in line]
        processor = names[0].split(":")[1].strip() if names else processor
    packages = ("tensorflow", "keras", "numpy", "keras-kfc")
    return {
        "processor": processor,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{package: importlib.metadata.version(package) for package in packages},
    }


def report(name: str, title: str, rows: Sequence[Mapping[str, Any]], **settings: Any) -> None:
    """Prints rows as a table and writes them, with the machine's description, as JSON.

    Args:
        name: Name of the file in `benchmarks/output`, without its ending.
        title: Title of the table.
        rows: What was measured; the first one's keys are the columns.
        **settings: What else the file should hold.
    """
    table = Table(title=title)
    for column in rows[0]:
        table.add_column(column, justify="left" if column == next(iter(rows[0])) else "right")
    for row in rows:
        table.add_row(*(_text(value) for value in row.values()))
    Console(width=160).print(table)
    OUTPUT.mkdir(exist_ok=True)
    path = OUTPUT / f"{name}.json"
    content = {"machine": describe_machine(), **settings, "rows": list(rows)}
    path.write_text(json.dumps(content, indent=2) + "\n")
    print(f"Written to {os.path.relpath(path)}")


def _text(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.3g}" if isinstance(value, float) else str(value)
