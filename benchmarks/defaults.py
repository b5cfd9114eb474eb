"""Compares settings of KFC, and other optimizers, on all test problems.

Run as `python -m benchmarks.defaults --data-dir DIR`; `--help` lists the options.
Prints the training loss after given numbers of iterations.
"""

import argparse
import ast
import time

import keras
import tensorflow as tf

import keras_kfc
from benchmarks.problems import Problem, problems

MARKS = {
    "conv": (25, 50, 100, 200),
    "conv-bn": (25, 50, 100, 200),
    "mlp": (25, 50, 100, 200, 300),
    "autoencoder": (25, 50, 100, 150, 300),
    "digits": (10, 25, 50, 100, 200),
}
SETTINGS = (
    "KFC()",
    "SGD(0.01, momentum=0.9)",
    "SGD(0.02, momentum=0.9)",
    "SGD(0.05, momentum=0.9)",
    "SGD(0.1, momentum=0.9)",
    "SGD(1.0, momentum=0.9)",
    "Adam(1e-3)",
    "Adam(3e-3)",
    "Adam(1e-2)",
)


def measure(problem: Problem, optimizer: keras.Optimizer, marks) -> tuple[list[float], float]:
    """Training losses after each number of iterations, and the seconds of training."""
    model = problem.build()
    if isinstance(optimizer, keras_kfc.KFC):
        keras_kfc.instrument(model)
    model.compile(optimizer=optimizer, loss=problem.loss)
    data = tf.data.Dataset.from_tensor_slices((problem.inputs, problem.targets))
    data = data.shuffle(len(problem.inputs), seed=1).repeat()
    batches = data.batch(problem.batch_size, drop_remainder=True).prefetch(2)
    losses, done, seconds = [], 0, 0.0
    for mark in marks:
        begin = time.perf_counter()
        model.fit(batches, steps_per_epoch=mark - done, verbose=0)
        seconds += time.perf_counter() - begin
        done = mark
        losses.append(
            model.evaluate(
                problem.inputs[: problem.evaluation],
                problem.targets[: problem.evaluation],
                batch_size=1000,
                verbose=0,
            )
        )
    return losses, seconds


def optimizer_of(setting: str) -> keras.Optimizer:
    """Makes an optimizer of a text like `KFC(damping=0.3)` or `SGD(0.05, momentum=0.9)`."""
    call = ast.parse(setting, mode="eval").body
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
        raise SystemExit(f"A setting must be a call like KFC(damping=0.3), not {setting!r}.")
    arguments = [ast.literal_eval(argument) for argument in call.args]
    options = {str(option.arg): ast.literal_eval(option.value) for option in call.keywords}
    if call.func.id == "KFC":
        return keras_kfc.KFC(*arguments, **{"seed": 1, **options})
    return getattr(keras.optimizers, call.func.id)(*arguments, **options)


def main() -> None:
    """Runs the comparison."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", help="folder of the Fashion-MNIST IDX files")
    parser.add_argument("--problems", nargs="+", choices=list(MARKS), default=list(MARKS))
    parser.add_argument(
        "--settings",
        nargs="+",
        default=list(SETTINGS),
        help='such as "KFC(damping=0.3)"; default: KFC() and a grid of SGD and Adam',
    )
    arguments = parser.parse_args()
    known = problems(arguments.data_dir)
    for name in arguments.problems:
        print(f"{name}: training loss after {MARKS[name]} iterations", flush=True)
        for setting in arguments.settings:
            losses, seconds = measure(known[name], optimizer_of(setting), MARKS[name])
            shown = "  ".join(f"{loss:.4f}" for loss in losses)
            print(f"  {setting:60} {shown}   {seconds:.1f} s", flush=True)


if __name__ == "__main__":
    main()
