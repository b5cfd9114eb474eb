"""What watching costs: a step with and without telemetry, and the numbers of one epoch.

Run as `python -m benchmarks.monitor`; `--help` lists the options. Steps take turns, and
medians are shown.
"""

import argparse
import time
from typing import Any

from benchmarks.harness import interleaved, report
from benchmarks.step import NETS, Training
from keras_kfc.monitor.callbacks import SPECTRA, CurvatureMonitor

# As many as all of KFC's periods divide.
STEPS = 20


def measure(net: str, repeats: int, jit_compile: bool) -> dict[str, Any]:
    """One network: milliseconds of a step, and seconds for the logs of an epoch."""
    plain, watched = (Training(net, "KFC", jit_compile) for _ in range(2))
    monitors = {spectrum: CurvatureMonitor(spectrum) for spectrum in SPECTRA}
    for monitor in monitors.values():
        monitor.set_model(watched.model)
        monitor.on_train_begin()
    seconds = interleaved(
        {"plain": lambda: plain.run(STEPS), "watched": lambda: watched.run(STEPS)}, repeats
    )
    row: dict[str, Any] = {"net": net}
    row |= {f"{name} ms": 1e3 * value / STEPS for name, value in seconds.items()}
    row["watched / plain"] = seconds["watched"] / seconds["plain"]
    for spectrum, monitor in monitors.items():
        begin = time.perf_counter()
        monitor.on_epoch_end(0, {})
        row[f"{spectrum}, s an epoch"] = time.perf_counter() - begin
    return row


def main() -> None:
    """Measures and reports."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nets", nargs="+", choices=NETS, default=["fashion", "resnet20", "mlp"])
    parser.add_argument("--xla", action="store_true", help="compile steps with XLA")
    parser.add_argument("--repeats", type=int, default=9)
    arguments = parser.parse_args()
    rows = [measure(net, arguments.repeats, arguments.xla) for net in arguments.nets]
    report("monitor", "What CurvatureMonitor costs", rows, repeats=arguments.repeats)


if __name__ == "__main__":
    main()
