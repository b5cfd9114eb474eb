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
from collections.abc import Callable
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import tensorflow as tf

SIZES = ((4, 64), (4, 128), (3, 256), (4, 512), (2, 1024))
WORKERS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
GBITS = (10, 100, 400)
MODES = ("none", "inverses", "preconditioning")
# Seconds until an exchange begins, for each doubling of the workers.
LATENCY = 2e-5
FACTORS_EVERY, INVERSES_EVERY = 10, 20


def work() -> None:
    """What each of two workers does."""
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    strategy = tf.distribute.MultiWorkerMirroredStrategy()
    # First, while nothing else is there that could run.
    renewal = _renewal(strategy)
    print(json.dumps({"renewal": renewal, "steps": _exchanges(strategy)}))


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


def _renewal(strategy: Any) -> dict[str, float]:
    """Median seconds in which all have all inverses."""
    import numpy as np

    from keras_kfc.linalg.stacks import invert_stacks
    from keras_kfc.placement.current import current_placement
    from keras_kfc.placement.sharded import spread

    rng = np.random.default_rng(0)
    stacks = []
    for count, size in SIZES:
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


def networks() -> dict[str, Callable[[], Any]]:
    """What the model is asked for, at the sizes of ImageNet."""
    import keras
    from keras import layers

    def vit() -> keras.Model:
        inputs = keras.Input((224, 224, 3))
        tensor = layers.Reshape((196, 768))(layers.Conv2D(768, 16, 16)(inputs))
        for _ in range(12):
            normed = layers.LayerNormalization()(tensor)
            tensor = tensor + layers.MultiHeadAttention(12, 64)(normed, normed)
            normed = layers.LayerNormalization()(tensor)
            tensor = tensor + layers.Dense(768)(layers.Dense(3072, "gelu")(normed))
        tensor = layers.GlobalAveragePooling1D()(layers.LayerNormalization()(tensor))
        return keras.Model(inputs, layers.Dense(1000, "softmax")(tensor))

    applications = keras.applications
    return {
        "ResNet50": lambda: applications.ResNet50(weights=None),
        "ViT-B/16": vit,
        "VGG16": lambda: applications.VGG16(weights=None),
    }


def demands(build: Callable[[], Any]) -> dict[str, Any]:
    """Parameters, shapes of the factors, and products of a preconditioned gradient."""
    import keras_kfc
    from keras_kfc.curvature.choice import planned_blocks

    model = keras_kfc.instrument(build())
    plans = planned_blocks(model.trainable_variables, "kronecker", 512, None)
    factors: collections.Counter[int] = collections.Counter()
    products = 0.0
    for plan in plans:
        stacks = [s for s in plan.layout.inverse_shapes.values() if len(s) == 3 and s[1] == s[2]]
        for count, size, _ in stacks:
            factors[size] += count
        groups, rows, columns = plan.layout.linear_map.groups, *_matrix(plan)
        cuts = [size for _, size, _ in stacks]
        products += groups * rows * columns * sum(cuts)
    return {"parameters": model.count_params(), "factors": factors, "products": products}


def _matrix(plan: Any) -> tuple[int, int]:
    linear_map = plan.layout.linear_map
    rows = linear_map.kernel_rows + plan.layout.use_bias
    return rows, linear_map.outputs // linear_map.groups


def seconds_of_inverses(sizes: set[int]) -> dict[int, float]:
    """Median seconds of one inverse of each size on this processor, several at a time."""
    from keras_kfc.linalg.stacks import invert_stacks

    found = {}
    for size in sorted(sizes):
        count = max(4, min(256, 1_000_000 // size**2))
        rows = tf.random.normal((count, size, 2 * size), seed=1)
        stack = tf.matmul(rows, rows, transpose_b=True) / size
        times = []
        for _ in range(6):
            begin = time.perf_counter()
            invert_stacks([stack], [tf.fill((count,), 0.1)])
            times.append((time.perf_counter() - begin) / count)
        found[size] = statistics.median(times[1:])
    return found


def products_a_second() -> float:
    """Products of a large matrix product on this processor."""
    matrix = tf.random.normal((1024, 1024))
    times = []
    for _ in range(6):
        begin = time.perf_counter()
        float(tf.reduce_sum(matrix @ matrix))
        times.append(time.perf_counter() - begin)
    return 1024**3 / statistics.median(times[1:])


def extra_seconds(
    demand: dict[str, Any], inverses: dict[int, float], rate: float, workers: int, gbits: float
) -> dict[str, float]:
    """Mean seconds of a step beyond those of one of Adam, by mode."""
    from keras_kfc.placement.sharded import shares_of

    bytes_a_second = gbits * 1e9 / 8
    wait = LATENCY * (workers - 1).bit_length()
    part = (workers - 1) / workers
    factors = demand["factors"]
    half = sum(count * size * (size + 1) // 2 for size, count in factors.items())
    every = sum(count * inverses[size] for size, count in factors.items())
    shares = shares_of([(count, size, size) for size, count in factors.items()], workers)
    largest = max(sum(n * inverses[size] for n, size, _ in share.shapes) for share in shares)
    averaging = (2 * part * 4 * half / bytes_a_second + wait) / FACTORS_EVERY
    gathering = seconds_of_gathering(demand, workers, gbits)
    products = demand["products"] / rate
    # As a sum of vectors that are zero elsewhere, since shares have different lengths.
    directions = 2 * part * 4 * demand["parameters"] / bytes_a_second + wait
    if workers == 1:
        averaging = gathering = directions = 0.0
    return {
        MODES[0]: averaging + every / INVERSES_EVERY + products,
        MODES[1]: averaging + (largest + gathering) / INVERSES_EVERY + products,
        MODES[2]: averaging
        + (largest + gathering) / INVERSES_EVERY
        + products / workers
        + directions,
    }


def seconds_of_gathering(demand: dict[str, Any], workers: int, gbits: float) -> float:
    """Seconds in which all workers exchange all inverses."""
    half = sum(count * size * (size + 1) // 2 for size, count in demand["factors"].items())
    sent = (workers - 1) / workers * 4 * half
    return sent / (gbits * 1e9 / 8) + LATENCY * (workers - 1).bit_length()


def model_costs() -> dict[str, Any]:
    """The cost model's numbers for all networks, workers and speeds."""
    needed = {name: demands(build) for name, build in networks().items()}
    inverses = seconds_of_inverses({size for d in needed.values() for size in d["factors"]})
    rate = products_a_second()
    costs = {
        name: {
            str(gbits): {str(w): extra_seconds(demand, inverses, rate, w, gbits) for w in WORKERS}
            for gbits in GBITS
        }
        for name, demand in needed.items()
    }
    parameters = {name: demand["parameters"] for name, demand in needed.items()}
    gathering = {
        name: {
            str(gbits): seconds_of_gathering(demand, 8, gbits) / INVERSES_EVERY for gbits in GBITS
        }
        for name, demand in needed.items()
    }
    return {
        "products a second": rate,
        "parameters": parameters,
        "extra seconds": costs,
        "exchange of inverses, 8 workers": gathering,
    }


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.distributed", description=__doc__)
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    if parser.parse_args().work:
        work()
        return
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
