"""Processes of this machine as the workers of a `MultiWorkerMirroredStrategy`."""

import contextlib
import json
import os
import pathlib
import socket
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple


class Finished(NamedTuple):
    """What became of a process."""

    code: int
    output: str
    errors: str


def free_addresses(count: int) -> list[str]:
    """Addresses on the loopback that nobody listens at."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [f"127.0.0.1:{one.getsockname()[1]}" for one in sockets]


def run_workers(
    command: Sequence[str],
    count: int = 2,
    seconds: float = 300,
    environment: Mapping[str, str] | None = None,
    chief: bool = False,
) -> list[Finished]:
    """Runs a command once for each worker, at the same time.

    Args:
        command: The command.
        count: Number of workers.
        seconds: After these, those that still run are ended.
        environment: Variables beside those of this process.
        chief: Whether the first one is called the chief, as some launchers do.

    Returns:
        How each ended. Where one fails, the others are ended, too, since they would wait for it.
    """
    addresses = free_addresses(count)
    processes = []
    with contextlib.ExitStack() as stack:
        folder = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for index in range(count):
            cluster = {"worker": addresses[1:] if chief else addresses}
            task = {"type": "worker", "index": index - chief}
            if chief:
                cluster["chief"] = addresses[:1]
                task = {"type": "chief", "index": 0} if index == 0 else task
            config = json.dumps({"cluster": cluster, "task": task})
            streams = [
                stack.enter_context((folder / f"{name}{index}").open("w+"))
                for name in ("output", "errors")
            ]
            process = subprocess.Popen(
                command,
                env={**os.environ, **(environment or {}), "TF_CONFIG": config},
                stdout=streams[0],
                stderr=streams[1],
            )
            processes.append((process, streams))
        last = time.monotonic() + seconds
        running = [process for process, _ in processes]
        while running and time.monotonic() < last:
            time.sleep(0.1)
            if any(process.poll() for process in running):
                # Those that fail by the same error do so by themselves.
                last = min(last, time.monotonic() + 5)
            running = [process for process in running if process.poll() is None]
        for process in running:
            process.kill()
        results = []
        for process, streams in processes:
            code = process.wait()
            for stream in streams:
                stream.seek(0)
            results.append(Finished(code, *(stream.read() for stream in streams)))
    return results
