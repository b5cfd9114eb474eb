"""What a step of KFC takes beyond one of Adam on many workers, for each `KFC(sharding=...)`.

From measured seconds of inverses and products on this processor, and the speed of the network.
Part of `benchmarks.distributed`.
"""

import collections
import statistics
import time
from collections.abc import Callable
from typing import Any

import tensorflow as tf

WORKERS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
GBITS = (10, 100, 400)
MODES = ("none", "inverses", "preconditioning")
# Seconds until an exchange begins, for each doubling of the workers.
LATENCY = 2e-5
FACTORS_EVERY, INVERSES_EVERY = 10, 20


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
