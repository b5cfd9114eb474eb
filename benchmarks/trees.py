"""KFC's step in this working tree against that in another one, such as a worktree of a release.

Each tree has a process of its own, and they take turns, so that a slow minute of a shared machine
slows both alike. `git worktree add ../before COMMIT`, then
`python -m benchmarks.trees ../before --nets fashion mlp`.
"""

import argparse
import pathlib
import statistics
import subprocess
import sys
import time
from typing import Any

from benchmarks.harness import report
from benchmarks.step import NETS

# Runs in the root of a tree, with that tree's own package and benchmarks.
_PROGRAM = """
import sys, time
from benchmarks.step import Training
training = Training(sys.argv[1], "KFC", False)
begin = time.perf_counter()
training.run(1)
print(time.perf_counter() - begin, flush=True)
for line in sys.stdin:
    begin = time.perf_counter()
    training.run(int(line))
    print(time.perf_counter() - begin, flush=True)
"""
# A period of the inverses, and steps in which updates are due more often.
_STEPS, _START = 20, 100


class Tree:
    """A training with the code of one tree.

    Args:
        root: Root of the tree.
        net: Name of the network.
    """

    def __init__(self, root: pathlib.Path, net: str):
        self._process = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM, net],
            cwd=root,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.first_step = self._answer()

    def seconds(self, steps: int) -> float:
        """Seconds that a number of steps takes."""
        stdin = self._process.stdin
        assert stdin is not None
        stdin.write(f"{steps}\n")
        stdin.flush()
        return self._answer()

    def close(self) -> None:
        """Ends the process."""
        self._process.communicate()

    def _answer(self) -> float:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("A tree's process has ended: try its benchmarks.step by itself")
        return float(line)


def measure(net: str, other: pathlib.Path, repeats: int) -> dict[str, Any]:
    """One row: medians of this tree's step and first step over the other's."""
    here = pathlib.Path(__file__).parents[1]
    steps, firsts = [], []
    for _ in range(2):
        trees = [Tree(here, net), Tree(other, net)]
        firsts.append(trees[0].first_step / trees[1].first_step)
        for tree in trees:
            tree.seconds(_START)
        pairs = [[tree.seconds(_STEPS) for tree in trees] for _ in range(repeats)]
        steps += [ours / theirs for ours, theirs in pairs]
        for tree in trees:
            tree.close()
        time.sleep(1)
    return {
        "net": net,
        "this step, ms": 1e3 * statistics.median(ours for ours, _ in pairs) / _STEPS,
        "step, this / other": statistics.median(steps),
        "first step, this / other": statistics.median(firsts),
    }


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.trees", description=__doc__.splitlines()[0] if __doc__ else ""
    )
    parser.add_argument("other", type=pathlib.Path, help="root of the other tree")
    parser.add_argument("--nets", nargs="+", choices=list(NETS), default=["fashion", "mlp"])
    parser.add_argument("--repeats", type=int, default=10)
    arguments = parser.parse_args()
    rows = [measure(net, arguments.other.resolve(), arguments.repeats) for net in arguments.nets]
    report("trees", f"KFC's step here against {arguments.other}", rows, repeats=arguments.repeats)


if __name__ == "__main__":
    main()
