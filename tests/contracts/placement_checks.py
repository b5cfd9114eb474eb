"""Checks of one placement, in a process with two logical processors; see `test_placements`."""

import functools
import json
import os
import sys
import traceback

import keras
import numpy as np
import tensorflow as tf

if "TF_CONFIG" in os.environ:
    # Before anything else uses TensorFlow.
    WORKERS = tf.distribute.MultiWorkerMirroredStrategy()
else:
    (_processor,) = tf.config.list_physical_devices("CPU")
    tf.config.set_logical_device_configuration(
        _processor, 2 * [tf.config.LogicalDeviceConfiguration()]
    )

from keras_kfc.linalg.stacks import invert_stacks
from keras_kfc.placement import averages, sharded
from keras_kfc.placement.api import PLACEMENTS
from keras_kfc.placement.averages import WeightedVariables
from keras_kfc.placement.current import current_placement, replica_number

# A line for each placement: how to make its strategy.
STRATEGIES = {
    "SinglePlacement": lambda: tf.distribute.OneDeviceStrategy("/cpu:0"),
    "WorkersPlacement": lambda: WORKERS,
    "MirroredPlacement": lambda: tf.distribute.MirroredStrategy(["/cpu:0", "/cpu:1"]),
}


def a_strategy_has_its_placement(strategy, name):
    """The registry finds it, and it knows its size."""
    with strategy.scope():
        placement = current_placement()
    assert type(placement).__name__ == name
    assert placement.count == strategy.num_replicas_in_sync


def sums_are_over_replicas(strategy, name):
    """Of tensors of different shapes, with different values on each replica."""

    @tf.function(autograph=False)
    def run():
        def replica():
            number = float(replica_number())
            return current_placement().sum([tf.ones(3), tf.constant(1.0 + number)])

        return strategy.run(replica)

    count = strategy.num_replicas_in_sync
    for ones, numbers in zip(*map(strategy.experimental_local_results, run()), strict=True):
        np.testing.assert_allclose(ones, np.full(3, count))
        assert float(numbers) == sum(range(1, count + 1))


def in_merged_call(strategy, function):
    """What a function returns that runs once for all replicas, in a condition in a graph."""
    results = []

    @tf.function(autograph=False)
    def run(condition):
        def replica():
            def once():
                results.append(tf.cond(condition, function, lambda: 0 * function()))

            current_placement().run_once(once)

        strategy.run(replica)
        return results.pop()

    return run(tf.constant(True)).numpy()


def parts_are_gathered_in_order(strategy, name):
    """Of all replicas; sums are over all, too."""
    count = strategy.num_replicas_in_sync

    def parts(placement):
        return [tf.fill((2,), number + 1.0) for number in placement.numbers]

    with strategy.scope():
        placement = current_placement()
    gathered = in_merged_call(strategy, lambda: placement.gather_parts(parts(placement)))
    np.testing.assert_array_equal(gathered, np.arange(1, count + 1)[:, None] * np.ones(2))
    summed = in_merged_call(strategy, lambda: placement.sum_parts(parts(placement)))
    np.testing.assert_array_equal(summed, gathered.sum(0))


def variable_of_copies(strategy, shape, dtype, value_of):
    """An optimizer variable whose copy on replica i is `value_of(i)`."""
    with strategy.scope():
        variable = keras.optimizers.SGD().add_variable(shape, dtype=dtype, name="copies")

    @tf.function(autograph=False)
    def run():
        strategy.run(lambda: variable.assign(tf.cast(value_of(replica_number()), dtype)))

    run()
    return variable


def copies_of(strategy, variable):
    with strategy.scope():
        return [copy.numpy() for copy in current_placement().copies(variable)]


def averages_are_weighted_and_taken_once(strategy, name):
    """All copies get them; weights of zero give zeros."""
    matrices = np.arange(18.0).reshape(2, 3, 3) % 7
    matrices += matrices.transpose(0, 2, 1)
    for scale in (1.0, 0.0):
        _check_averages(strategy, scale, matrices)


def _check_averages(strategy, scale, matrices):
    count = strategy.num_replicas_in_sync
    weight = variable_of_copies(strategy, (), "float32", lambda i: scale * (i + 1.0))
    vector = variable_of_copies(strategy, (2,), "float32", lambda i: tf.fill((2,), 3.0 * i + 1))
    matrix = variable_of_copies(strategy, (2, 3, 3), "float32", lambda i: (i + 1) * matrices)

    def average():
        placement = current_placement()
        assert len(placement.copies(vector)) == len(placement.numbers)
        group = WeightedVariables(weight, [vector, matrix], [False, True])
        averages.average(placement, [group])
        return tf.zeros(())

    in_merged_call(strategy, average)
    weights, numbers = np.arange(1, count + 1), np.arange(count)
    mean = np.average(3.0 * numbers + 1, weights=weights) * scale
    whole = np.average(numbers + 1.0, weights=weights) * scale * matrices
    for copy in copies_of(strategy, vector):
        np.testing.assert_allclose(copy, [mean, mean], rtol=1e-6)
    for copy in copies_of(strategy, matrix):
        np.testing.assert_allclose(copy, whole, rtol=1e-6)
    for copy in copies_of(strategy, weight):
        np.testing.assert_allclose(copy, scale * weights.mean(), rtol=1e-6)


def counts_are_added_up(strategy, name):
    """From what all agreed on: 5, and then i more on replica i."""
    counter = variable_of_copies(strategy, (), "int64", lambda i: 5 + i)

    def add_up():
        averages.add_up(current_placement(), counter)
        return tf.zeros(())

    in_merged_call(strategy, add_up)
    for copy in copies_of(strategy, counter):
        assert copy == 5 + sum(range(strategy.num_replicas_in_sync))


def inverses_are_those_of_one_replica(strategy, name):
    """Shared out and exchanged, in their order; and each replica inverts its share."""
    rng = np.random.default_rng(0)
    shapes, stacks, shifts = [(3, 40), (1, 64), (5, 7), (1, 3)], [], []
    for number, (count, size) in enumerate(shapes):
        rows = rng.normal(size=(count, size, 2 * size)).astype("float32")
        # Constants would be inverted while the graph is optimised, with other kernels.
        stacks.append(tf.Variable(rows @ rows.transpose(0, 2, 1)))
        shifts.append(tf.fill((count,), 0.1 * (number + 1)))
    sharded._FEWEST_PRODUCTS = 0
    inverted = []

    def invert(own, own_shifts):
        inverted.append(sum(stack.shape[0] * stack.shape[1] ** 3 for stack in own))
        return invert_stacks(own, own_shifts)

    with strategy.scope():
        placement = current_placement()

    def together(function):
        found = function(list(map(tf.convert_to_tensor, stacks)), shifts)
        return tf.concat([tf.reshape(one, (-1,)) for one in found], axis=0)

    spread = functools.partial(sharded.spread, placement, invert)
    found, expected = (
        in_merged_call(strategy, functools.partial(together, function))
        for function in (spread, invert_stacks)
    )
    # Products of one matrix and of several may be summed in another order.
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6 * abs(expected).max())
    total = sum(count * size**3 for count, size in shapes)
    # The largest matrix alone is more than half of it.
    assert max(inverted) < 0.6 * total or strategy.num_replicas_in_sync == 1


def another_strategy_is_refused(strategy, name):
    """One with several replicas that nobody has registered."""
    if strategy.num_replicas_in_sync == 1:
        return

    class Other(type(strategy)):
        pass

    try:
        with Other(*([["/cpu:0", "/cpu:1"]] if name == "MirroredPlacement" else [])).scope():
            current_placement()
    except ValueError as error:
        assert "a Other with 2" in str(error) and "tf.distribute.MirroredStrategy" in str(error)
    else:
        raise AssertionError("it was not refused")


CHECKS = {
    check.__name__: check
    for check in (
        a_strategy_has_its_placement,
        sums_are_over_replicas,
        parts_are_gathered_in_order,
        averages_are_weighted_and_taken_once,
        counts_are_added_up,
        inverses_are_those_of_one_replica,
        another_strategy_is_refused,
    )
}


def main():
    """Prints what went wrong in each check of a placement, and which placements there are."""
    name = sys.argv[1]
    strategy = STRATEGIES[name]()
    faults = {}
    for check, function in CHECKS.items():
        try:
            function(strategy, name)
            faults[check] = ""
        except Exception:
            faults[check] = traceback.format_exc()
    registered = [kind.__name__ for kind in PLACEMENTS.values()]
    print(json.dumps({"faults": faults, "registered": registered}))


if __name__ == "__main__":
    main()
