"""What several workers exchange, what sharing inverses saves, and what it would cost elsewhere.

`python -m benchmarks.distributed` starts two workers on this machine, each with one thread, counts
the collective operations of a step in its graph and the numbers in them, and times a renewal of
inverses with and without sharing. Then, without any worker, a cost model: from measured seconds
of inverses and products on this processor, what a mean step of ResNet50, ViT-B/16 and VGG16 takes
beyond one of Adam on 1 to 256 workers, by the speed of the network, for each `KFC(sharding=...)`.
As a table, as a picture and as JSON.
"""

import argparse
import collections
import functools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import tensorflow as tf

# Numbers of factors and their rows.
SIZES = {
    "64 to 1,024 rows": ((4, 64), (4, 128), (3, 256), (4, 512), (2, 1024)),
    "256 to 2,048 rows": ((4, 256), (4, 512), (2, 1024), (2, 2048)),
}


def work() -> None:
    """What each of two workers does."""
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    strategy = tf.distribute.MultiWorkerMirroredStrategy()
    # First, while nothing else is there that could run.
    renewals = {name: _renewal(strategy, sizes) for name, sizes in SIZES.items()}
    print(json.dumps({"renewals": renewals, "steps": _exchanges(strategy)}))


def _exchanges(strategy: Any) -> dict[str, Any]:
    """Collective operations in the graphs of a step, for each optimizer."""
    import keras
    import numpy as np

    import keras_kfc
    from examples.nets import fashion_net

    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(64, 28, 28, 1)).astype("float32"), rng.integers(0, 10, 64)
    batches = tf.data.Dataset.from_tensor_slices((x, y)).batch(32)
    counts = {}
    makers: dict[str, Callable[[], Any]] = {
        "KFC()": lambda: keras_kfc.KFC(seed=1),
        "KFC(sharding='preconditioning')": lambda: keras_kfc.KFC(
            seed=1, sharding="preconditioning"
        ),
        "KFC(global_clipnorm=1.0)": lambda: keras_kfc.KFC(seed=1, global_clipnorm=1.0),
        "Adam()": keras.optimizers.Adam,
    }
    for name, make in makers.items():
        with strategy.scope():
            model = keras_kfc.instrument(fashion_net())
            model.compile(make(), "sparse_categorical_crossentropy")
        with strategy.scope():
            model.optimizer.build(model.trainable_variables)
        data = iter(strategy.experimental_distribute_dataset(batches))

        def replica(batch: Any, model: Any = model) -> Any:
            return model.train_step(batch)

        def step(data: Any = data, replica: Any = replica) -> Any:
            return strategy.run(replica, (next(data),))

        function = tf.function(step, autograph=False)
        graph = function.get_concrete_function().graph
        counts[name] = {
            "parameters": model.count_params(),
            "every step": _collectives(graph.get_operations()),
            "when due": collections.Counter(
                node.op
                for part in graph.as_graph_def().library.function
                for node in part.node_def
                if node.op.startswith("Collective")
            ),
        }
    return counts


def _collectives(operations: Any) -> list[list[Any]]:
    """Kind and number of numbers of each collective operation."""
    return [
        [operation.type, operation.inputs[0].shape.num_elements()]
        for operation in operations
        if operation.type.startswith("Collective")
    ]


def _renewal(strategy: Any, sizes: Sequence[tuple[int, int]]) -> dict[str, float]:
    """Median seconds in which all have all inverses."""
    import numpy as np

    from keras_kfc.linalg.stacks import invert_stacks
    from keras_kfc.placement.current import current_placement
    from keras_kfc.placement.sharded import spread

    rng = np.random.default_rng(0)
    stacks = []
    for count, size in sizes:
        rows = rng.normal(size=(count, size, 2 * size)).astype("float32")
        stacks.append(tf.Variable(rows @ rows.transpose(0, 2, 1) / size))
    with strategy.scope():
        placement = current_placement()
        inverses = [tf.Variable(tf.zeros_like(stack)) for stack in stacks]

    def renewal(invert: Callable[..., list[tf.Tensor]]) -> Any:
        def once(_: Any) -> None:
            shifts = [tf.fill((stack.shape[0],), 0.1) for stack in stacks]
            found = invert([tf.convert_to_tensor(stack) for stack in stacks], shifts)
            for variable, inverse in zip(inverses, found, strict=True):
                variable.assign(inverse)

        def replica() -> None:
            tf.distribute.get_replica_context().merge_call(once)

        return tf.function(lambda: strategy.run(replica), autograph=False)

    share = functools.partial(spread, placement, invert_stacks)
    functions = {"none": renewal(invert_stacks), "inverses": renewal(share)}
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(12):
        for name, function in functions.items():
            begin = time.perf_counter()
            function()
            if turn:
                seconds[name].append(time.perf_counter() - begin)
    return {name: statistics.median(values) for name, values in seconds.items()}


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.distributed", description=__doc__)
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    if parser.parse_args().work:
        work()
        return
    from benchmarks.cost_model import model_costs
    from benchmarks.distributed_report import show
    from benchmarks.workers import run_workers

    finished = run_workers([sys.executable, "-m", "benchmarks.distributed", "--work"])
    for worker in finished:
        if worker.code:
            raise SystemExit(worker.errors[-2000:])
    measured = json.loads(finished[0].output.splitlines()[-1])
    show(measured, model_costs())


if __name__ == "__main__":
    main()
