"""KFC on several workers: processes of this machine, which train as several machines would.

`python -m examples.several_workers` starts them by itself, each with one thread, so that a worker
stands for a machine with one core. It trains a conv net on enlarged digits alone and together, at
the same batch size, shows that all workers have equal weights after every epoch, and draws.
"""

import argparse
import contextlib
import hashlib
import json
import os
import pathlib
import socket
import subprocess
import sys
import tempfile
import time

if __name__ == "__main__" and not __package__:
    sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

BATCH = 256


def work(arguments: argparse.Namespace) -> None:
    """What each process does; the cluster is described by TF_CONFIG, as on several machines."""
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    # The first thing that uses TensorFlow, on every worker.
    strategy = tf.distribute.get_strategy()
    if "TF_CONFIG" in os.environ:
        strategy = tf.distribute.MultiWorkerMirroredStrategy()
    import keras

    import keras_kfc
    from examples.data import load_digits
    from examples.nets import fashion_net

    digits = load_digits()
    # 28 by 28 pixels: each of theirs four times four, without a rim of two.
    images = digits.train_images.repeat(4, axis=1).repeat(4, axis=2)[:, 2:-2, 2:-2]
    # --8<-- [start:worker]
    options = tf.data.Options()
    # Each worker takes its part of every batch.
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.DATA
    batches = tf.data.Dataset.from_tensor_slices((images, digits.train_labels))
    batches = batches.shuffle(len(images), seed=1).repeat().batch(BATCH).with_options(options)
    with strategy.scope():
        model = keras_kfc.instrument(fashion_net())
        # The exact Fisher matrix has no draws, which would differ from those of one worker.
        optimizer = keras_kfc.KFC(fisher="exact")
        model.compile(optimizer, "sparse_categorical_crossentropy")
    # --8<-- [end:worker]

    found, times, ends = [], [], []

    class Watch(keras.callbacks.Callback):
        def on_train_batch_end(self, batch: int, logs: object = None) -> None:
            times.append(time.perf_counter())

        def on_epoch_end(self, epoch: int, logs: object = None) -> None:
            weights = b"".join(weight.tobytes() for weight in self.model.get_weights())
            ends.append(times[-1] - times[0])
            found.append(hashlib.sha256(weights).hexdigest()[:10])

    history = model.fit(
        batches,
        epochs=arguments.epochs,
        shuffle=False,
        steps_per_epoch=arguments.steps,
        verbose=0,
        callbacks=[Watch()],
    )
    # The first epoch has the start in it.
    last = times[-arguments.steps :]
    seconds = (last[-1] - last[0]) / max(1, len(last) - 1)
    losses = history.history["loss"]
    result = {"digests": found, "seconds": seconds, "losses": losses, "ends": ends}
    pathlib.Path(arguments.result).write_text(json.dumps(result))


def run(workers: int, arguments: argparse.Namespace) -> list[dict]:
    """Starts processes that train together, and returns what each of them found."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(workers)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        addresses = [f"127.0.0.1:{one.getsockname()[1]}" for one in sockets]
    with tempfile.TemporaryDirectory() as folder:
        results = [pathlib.Path(folder, f"{index}.json") for index in range(workers)]
        processes = []
        for index, result in enumerate(results):
            environment = dict(os.environ)
            if workers > 1:
                task = {"type": "worker", "index": index}
                cluster = {"cluster": {"worker": addresses}, "task": task}
                environment["TF_CONFIG"] = json.dumps(cluster)
            script = [
                sys.executable,
                str(pathlib.Path(__file__).resolve()),
                "--result",
                str(result),
            ]
            sizes = ["--epochs", str(arguments.epochs), "--steps", str(arguments.steps)]
            processes.append(subprocess.Popen([*script, *sizes], env=environment))
        if any([process.wait() for process in processes]):
            raise SystemExit("A worker failed; see above.")
        return [json.loads(result.read_text()) for result in results]


def draw(results: dict[str, dict], folder: pathlib.Path) -> None:
    """Draws the loss of each epoch against seconds since the first step was done."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
    for name, result in results.items():
        axis.plot(result["ends"], result["losses"], marker="o", label=name)
    axis.set(xlabel="seconds since the first step was done", ylabel="training loss of an epoch")
    axis.set_title(f"The same batches of {BATCH}, alone and shared")
    axis.set_yscale("log")
    axis.grid(alpha=0.3)
    axis.legend()
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / "several-workers.png", dpi=110)
    plt.close(figure)


def main() -> None:
    """Trains alone and together, and prints both."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20, help="of an epoch")
    parser.add_argument(
        "--output",
        type=pathlib.Path,
        default=pathlib.Path(__file__).resolve().parent / "output",
        help="folder for the picture (default: examples/output)",
    )
    parser.add_argument("--result", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.result:
        work(arguments)
        return
    from rich.console import Console
    from rich.table import Table

    alone = run(1, arguments)[0]
    together = run(arguments.workers, arguments)
    weights = Table(title="Weights after each epoch, as a digest")
    for heading in ("worker", *(f"epoch {epoch + 1}" for epoch in range(arguments.epochs))):
        weights.add_column(heading)
    for index, result in enumerate(together):
        weights.add_row(str(index), *result["digests"])
    speed = Table(title=f"The last epoch, batch {BATCH}")
    for heading in ("workers", "seconds a step", "speed-up", "training loss"):
        speed.add_column(heading, justify="right")
    for count, result in ((1, alone), (arguments.workers, together[0])):
        speed_up = alone["seconds"] / result["seconds"]
        cells = (f"{result['seconds']:.3f}", f"{speed_up:.2f}", f"{result['losses'][-1]:.4f}")
        speed.add_row(str(count), *cells)
    console = Console()
    console.print(weights)
    console.print(speed)
    draw({"one worker": alone, f"{arguments.workers} workers": together[0]}, arguments.output)
    if any(result["digests"] != together[0]["digests"] for result in together):
        raise SystemExit("The workers have parted.")
    console.print("All workers have the same weights, to the bit, after every epoch.")


if __name__ == "__main__":
    main()
