"""Branches that are run for what they do: when, and as `tf.cond` would."""

import pytest
import tensorflow as tf

from keras_kfc.utils.branches import run_if


def counted(jit_compile=False):
    """A function that adds twice its argument to a variable if it is positive, and its traces."""
    total, traces = tf.Variable(0.0), []

    def step(value):
        doubled = 2 * value

        def branch():
            traces.append(1)
            total.assign_add(doubled)

        run_if(value > 0, branch)
        # What comes after sees what the branch did.
        return total + 0.0

    graph = tf.function(step, autograph=False, jit_compile=jit_compile)
    return step, graph, total, traces


@pytest.mark.parametrize("jit_compile", [False, True])
def test_a_branch_runs_where_its_condition_holds(jit_compile):
    _, graph, total, traces = counted(jit_compile)
    seen = [float(graph(tf.constant(value))) for value in (1.0, -5.0, 3.0)]
    assert seen == [2.0, 2.0, 8.0] and float(total) == 8.0
    assert len(traces) == 1


def test_eagerly_it_is_python_that_chooses():
    step, _, total, traces = counted()
    assert [float(step(tf.constant(value))) for value in (1.0, -5.0, 3.0)] == [2.0, 2.0, 8.0]
    assert len(traces) == 2


def test_a_branch_stays_a_function_of_the_graph():
    _, graph, _, _ = counted()
    nodes = graph.get_concrete_function(tf.constant(1.0)).graph.as_graph_def().node
    (branch,) = [node for node in nodes if node.op == "If"]
    assert not any("lower" in name for name in branch.attr)


def test_backward_passes_may_run_in_a_branch():
    """A tape that was recorded outside is differentiated inside, as factors are."""
    result = tf.Variable(0.0)

    @tf.function(autograph=False)
    def step(value):
        with tf.GradientTape() as tape:
            tape.watch(value)
            cube = value**3

        def branch():
            result.assign(tape.gradient(cube, value))

        run_if(value > 0, branch)

    step(tf.constant(2.0))
    assert float(result) == 12.0
    step(tf.constant(-2.0))
    assert float(result) == 12.0
