"""What a training step computes, read off its graph: work that is not due is not in it."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import few
from nets import conv_net, flat_weights, image_batch

import keras_kfc
from benchmarks.nets import resnet20

# What factors and inverses are made with, and nothing else in a step of `conv_net`.
DECOMPOSITIONS = {"Cholesky", "MatrixInverse", "MatrixTriangularSolve"}
BRANCHES = {"If", "StatelessIf"}


def step_graph(optimizer):
    """Graph of a training step of a small conv net, and the model."""
    model = conv_net(batch_norm=False)
    model.compile(optimizer, "sparse_categorical_crossentropy")
    images, labels = map(tf.constant, image_batch())
    model.train_on_batch(images, labels)

    @tf.function(autograph=False)
    def step(images, labels):
        return model.train_step((images, labels))

    return step.get_concrete_function(images, labels).graph, model


def reachable_ops(graph, functions, through_branches):
    """All ops that run whenever the step runs; those in branches of conditions on request."""
    for op in graph.get_operations() if hasattr(graph, "get_operations") else graph.node_def:
        kind = getattr(op, "type", None) or op.op
        yield kind
        node = getattr(op, "node_def", op)
        if kind in BRANCHES and not through_branches:
            continue
        for attribute in node.attr.values():
            names = [attribute.func.name, *(f.name for f in attribute.list.func)]
            for name in filter(None, names):
                yield from reachable_ops(functions[name], functions, through_branches)


def counts(optimizer, through_branches):
    graph, _ = step_graph(optimizer)
    functions = {f.signature.name: f for f in graph.as_graph_def().library.function}
    kinds = list(reachable_ops(graph, functions, through_branches))
    return {kind: kinds.count(kind) for kind in set(kinds)}


@pytest.mark.slow
def test_decompositions_and_second_backward_pass_are_in_branches_only():
    always = counts(keras_kfc.KFC(seed=1), through_branches=False)
    everything = counts(keras_kfc.KFC(seed=1), through_branches=True)
    plain = counts(keras.optimizers.SGD(), through_branches=False)
    assert not DECOMPOSITIONS & set(always)
    assert set(everything) >= DECOMPOSITIONS
    # Backward passes: one of the model, the other in a branch.
    kind = "Conv2DBackpropFilter"
    assert always[kind] == plain[kind] == everything[kind] == 1
    assert everything["ReluGrad"] == 2 * always["ReluGrad"] == 2 * plain["ReluGrad"]
    # Two products for each block's preconditioning, and no others.
    products = sum(always.get(kind, 0) for kind in ("MatMul", "BatchMatMulV2", "BatchMatMulV3"))
    plain_products = sum(plain.get(kind, 0) for kind in ("MatMul", "BatchMatMulV2"))
    assert products == plain_products + 2 * 2


def test_factors_are_not_read_outside_of_branches():
    graph, model = step_graph(keras_kfc.KFC(seed=1))
    handles = {id(handle): inside for handle, inside in graph.captures}
    users: dict[str, set[str]] = {}
    for block in model.optimizer.blocks:
        for name in ("omega", "gamma", "omega_inverse"):
            inside = handles[id(getattr(block, name).value.handle)]
            users.setdefault(name, set()).update(op.type for op in inside.consumers())
    assert users["omega"] <= BRANCHES
    assert users["gamma"] <= BRANCHES
    # What is read in every step shows as such.
    assert "ReadVariableOp" in users["omega_inverse"]


@pytest.mark.parametrize("options", few([{}, {"steps_per_execution": 2}], 1), ids=["step", "steps"])
@pytest.mark.slow
def test_an_optimizer_that_is_built_in_the_first_step_costs_no_second_trace(options):
    """And trains as one that was built before."""
    images, labels = image_batch(64)

    def trained(built):
        model, calls = conv_net(), []
        optimizer = keras_kfc.KFC(seed=1)
        model.compile(optimizer, "sparse_categorical_crossentropy", **options)
        if built:
            optimizer.build(model.trainable_variables)
        original = model.train_step
        model.train_step = lambda data: calls.append(1) or original(data)
        model.fit(images, labels, batch_size=16, epochs=2, shuffle=False, verbose=0)
        return len(calls), flat_weights(model)

    (count, weights), (other_count, other_weights) = trained(True), trained(False)
    assert other_count == count
    np.testing.assert_allclose(other_weights, weights, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("jit_compile", [False, pytest.param(True, marks=pytest.mark.nightly)])
def test_nothing_is_traced_again(jit_compile):
    images, labels = image_batch(128)
    model = conv_net()
    model.compile(
        keras_kfc.KFC(curvature_update_period=2, inverse_update_period=3),
        "sparse_categorical_crossentropy",
        jit_compile=jit_compile,
    )
    calls = []
    original = model.train_step
    model.train_step = lambda data: calls.append(1) or original(data)
    model.fit(images, labels, batch_size=32, epochs=1, verbose=0)
    traced = len(calls)
    model.fit(images, labels, batch_size=32, epochs=3, verbose=0)
    assert len(calls) == traced
    assert np.isfinite(model.get_weights()[0]).all()


# They move no numbers, or are made once.
FREE = {"Const", "Placeholder", "NoOp", "ReadVariableOp", "Shape", "ShapeN"}
FREE |= {"Identity", "IdentityN", "StopGradient", "PreventGradient"}
FREE |= {"Reshape", "Squeeze", "ExpandDims"}


def launched(model):
    """Operations that a step of a model launches when nothing is due."""
    x, y = tf.zeros((32, *model.input_shape[1:])), tf.zeros((32,), tf.int64)
    model.optimizer.build(model.trainable_variables)
    step = tf.function(lambda: model.train_step((x, y)), autograph=False)
    graph = step.get_concrete_function().graph.as_graph_def()
    functions = {function.signature.name: function for function in graph.library.function}
    kinds = [node.op for node in graph.node]
    branches = [node.attr["then_branch"].func.name for node in graph.node if node.op in BRANCHES]
    # The last one is the step itself, which a gradient that is not finite skips.
    for branch in branches[-1:]:
        kinds += [node.op for node in functions[branch].node_def]
    return sum(kind not in FREE for kind in kinds), len(branches)


@pytest.mark.slow
def test_a_step_with_nothing_due_launches_little_more_than_adams():
    """What bounds a step on a GPU, on a residual net of 20 layers with batch normalisation."""
    counts = []
    for optimizer in (keras_kfc.KFC(), keras.optimizers.Adam()):
        model = resnet20()
        if isinstance(optimizer, keras_kfc.KFC):
            keras_kfc.instrument(model)
        model.compile(optimizer, "sparse_categorical_crossentropy", jit_compile=False)
        counts.append(launched(model))
    (ours, branches), (adams, _) = counts
    assert branches == 3
    assert ours < 1.3 * adams


@pytest.mark.parametrize("known", [True, False], ids=["known", "unknown"])
def test_a_gradient_whose_rows_are_preconditioned_is_not_computed(known):
    """A wide layer and a narrow one; of the wide one's gradient only the rows are used."""

    def products(optimizer):
        keras.utils.set_random_seed(1)
        wide = [keras.Input((300,)), keras.layers.Dense(400, "relu"), keras.layers.Dense(10)]
        model = keras_kfc.instrument(keras.Sequential(wide))
        model.compile(optimizer, "mse", jit_compile=False)
        optimizer.build(model.trainable_variables)
        examples = 8 if known else None
        signature = [tf.TensorSpec((examples, size)) for size in (300, 10)]
        step = tf.function(lambda x, y: model.train_step((x, y)), autograph=False)
        graph = step.get_concrete_function(*signature).graph
        # What nobody asks for is in the graph, but does not run.
        waiting = [*graph.control_outputs, *(tensor.op for tensor in graph.outputs)]
        runs = {}
        while waiting:
            op = waiting.pop()
            if op.name not in runs:
                runs[op.name] = op.type
                waiting += [*op.control_inputs, *(tensor.op for tensor in op.inputs)]
        kinds = list(runs.values())
        return kinds.count("MatMul") + kinds.count("BatchMatMulV2")

    # Of the narrow layer two products. Of the wide one five in place of its gradient; where the
    # size of the batch decides they are in a branch.
    others = 2 + 5 if known else 2
    assert products(keras_kfc.KFC(seed=1)) == products(keras.optimizers.SGD()) - 1 + others
