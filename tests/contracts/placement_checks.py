"""Checks of one placement, in a process with two logical processors; see `test_placements`."""

import json
import sys
import traceback

import keras
import numpy as np
import tensorflow as tf

(_processor,) = tf.config.list_physical_devices("CPU")
tf.config.set_logical_device_configuration(_processor, 2 * [tf.config.LogicalDeviceConfiguration()])

from keras_kfc.placement.api import PLACEMENTS  # noqa: E402
from keras_kfc.placement.current import current_placement, replica_number  # noqa: E402

# A line for each placement: how to make its strategy.
STRATEGIES = {
    "SinglePlacement": lambda: tf.distribute.OneDeviceStrategy("/cpu:0"),
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


def averages_are_weighted_and_taken_once(strategy, name):
    """All copies get them; weights of zero give zeros."""
    count = strategy.num_replicas_in_sync
    with strategy.scope():
        optimizer = keras.optimizers.SGD()
        variable = optimizer.add_variable((2,), dtype="float32", name="mean")
        calls = optimizer.add_variable((), dtype="int64", name="calls")

    @tf.function(autograph=False)
    def run(weighed):
        def replica():
            placement = current_placement()
            variable.assign(tf.fill((2,), 10.0 * replica_number() + 4.0))

            def average():
                assert len(placement.copies(variable)) == count
                weights = [weighed * float(i + 1) for i in range(count)]
                placement.average(variable, weights)
                calls.value.assign_add(1)

            placement.run_once(average)

        strategy.run(replica)

    values = [10.0 * i + 4.0 for i in range(count)]
    # A single copy has nothing to be averaged with.
    nothing = 0.0 if count > 1 else 4.0
    for weighed, expected in ((1.0, np.average(values, weights=range(1, count + 1))), (0, nothing)):
        run(tf.constant(weighed, tf.float32))
        with strategy.scope():
            copies = current_placement().copies(variable)
        for copy in copies:
            np.testing.assert_allclose(copy, np.full(2, expected), rtol=1e-6)
    assert int(calls.numpy()) == 2


def another_strategy_is_refused(strategy, name):
    """One with several replicas that nobody has registered."""
    if strategy.num_replicas_in_sync == 1:
        return

    class Other(type(strategy)):
        pass

    try:
        with Other(["/cpu:0", "/cpu:1"]).scope():
            current_placement()
    except ValueError as error:
        assert "a Other with 2" in str(error) and "MirroredStrategy" in str(error)
    else:
        raise AssertionError("it was not refused")


CHECKS = {
    check.__name__: check
    for check in (
        a_strategy_has_its_placement,
        sums_are_over_replicas,
        averages_are_weighted_and_taken_once,
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
