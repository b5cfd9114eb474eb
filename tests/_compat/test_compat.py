"""The private names of Keras and TensorFlow that the package uses: each still does what it did.

A failure here says which one has moved, before anything else fails in a way that is harder to
understand, or trains with a wrong Fisher matrix.
"""

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_kfc._compat import keras_internals, multi_worker_fit, tensorflow_internals
from keras_kfc._compat.layer_hooks import TellsWhenBuilt, kernel_of
from keras_kfc._compat.whole_step import WholeStepOptimizer

MOVED = "Keras moved {}: see keras_kfc/_compat/keras_internals.py"
MOVED_STEP = "Keras moved {}: see keras_kfc/_compat/whole_step.py"
MOVED_LAYER = "Keras moved {}: see keras_kfc/_compat/layer_hooks.py"
MOVED_TF = "TensorFlow moved {}: see keras_kfc/_compat/tensorflow_internals.py"


def test_a_layer_knows_the_model_call_that_it_is_in():
    seen = []

    class Looks(keras.layers.Layer):
        def call(self, inputs):
            seen.append(keras_internals.call_context())
            return inputs

    model = keras.Sequential([keras.Input((2,)), Looks()])
    seen.clear()
    model(np.ones((1, 2)), training=True)
    (context,) = seen
    assert context is not None and context.entry_layer is model, MOVED.format("current_call_ctx")
    assert context.training is True, MOVED.format("the call context's training")
    assert keras_internals.call_context() is None


def test_masks_travel_with_tensors():
    embedded = keras.layers.Embedding(3, 2, mask_zero=True)(np.array([[1, 0]]))
    mask = keras_internals.mask_of(embedded)
    assert mask is not None, MOVED.format("_keras_mask")
    np.testing.assert_array_equal(mask, [[True, False]])
    assert keras_internals.mask_of(tf.ones(2)) is None
    tensor = tf.ones((1, 2))
    keras_internals.set_mask(tensor, mask)
    with_mask = keras.losses.MeanSquaredError()(tf.zeros((1, 2)), tensor)
    assert float(with_mask) == pytest.approx(1.0) and keras_internals.mask_of(tensor) is mask


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_outputs_tell_their_logits(activation):
    logits = tf.constant([[1.0, -2.0]])
    outputs = keras.activations.get(activation)(logits)
    noted = keras_internals.logits_of(outputs)
    assert noted is not None, MOVED.format("_keras_logits")
    np.testing.assert_array_equal(noted, logits)
    other = tf.identity(outputs)
    keras_internals.set_logits(other, 100 * logits)
    loss = keras.losses.BinaryCrossentropy() if activation == "sigmoid" else None
    loss = loss or keras.losses.CategoricalCrossentropy()
    assert float(loss(tf.constant([[0.0, 1.0]]), other)) > 90, MOVED.format(
        "the use of _keras_logits"
    )


def test_losses_tell_their_function_and_options():
    loss = keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=0.1)
    function = keras_internals.wrapped_function(loss)
    assert function is keras.losses.categorical_crossentropy, MOVED.format("LossFunctionWrapper")
    options = keras_internals.wrapped_options(loss)
    assert options["from_logits"] is True, MOVED.format("_fn_kwargs")
    assert options["label_smoothing"] == 0.1, MOVED.format("_fn_kwargs")

    class Own(keras.losses.Loss):
        def call(self, y_true, y_pred):
            return y_pred

    assert keras_internals.wrapped_function(Own()) is None


def test_targets_get_the_rank_of_outputs():
    targets, outputs = keras_internals.of_the_same_rank(tf.ones(3), tf.ones((3, 1)))
    assert targets.shape == outputs.shape, MOVED.format("squeeze_or_expand_to_same_rank")


def test_a_compiled_loss_pairs_its_parts_with_other_losses():
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    compiled = keras_internals.compiled_loss_of(model)
    assert compiled is not None, MOVED.format("_compile_loss")
    compiled = keras_internals.compile_loss(
        {"a": "mse", "b": keras.losses.Huber()}, type("Named", (), {"output_names": ["a", "b"]})
    )
    calls = []

    def other(loss, weight):
        def call(y_true, y_pred, sample_weight=None):
            calls.append((loss.name, weight, float(y_true[0, 0])))
            return tf.zeros(())

        return call

    outputs = {"a": tf.zeros((1, 1)), "b": tf.zeros((1, 1))}
    targets = {"b": tf.constant([[2.0]]), "a": tf.constant([[1.0]])}
    keras_internals.call_with_other_losses(compiled, other, targets, outputs, None)
    assert sorted(call[2] for call in calls) == [1.0, 2.0], MOVED.format("_flat_losses")
    assert {name.split("_")[0]: value for name, _, value in calls}["huber"] == 2.0


def test_layers_and_their_variables_are_found():
    inner = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    outer = keras.Sequential([inner, keras.layers.Dropout(0.5)])
    found = keras_internals.layers_within(outer, include_self=False)
    assert inner.layers[0] in list(found), MOVED.format("_flatten_layers")
    assert outer not in list(found) and outer in list(keras_internals.layers_within(outer))
    assert len(keras_internals.own_trainable_variables(inner.layers[0])) == 2
    assert keras_internals.own_trainable_variables(inner) == []


def test_what_takes_training_is_known():
    assert keras_internals.takes_training(keras.layers.Dropout(0.5))
    assert not keras_internals.takes_training(keras.layers.Flatten())


def test_recording_is_noticed():
    assert not tensorflow_internals.is_recording(), MOVED_TF.format("could_possibly_record")
    with tf.GradientTape() as tape:
        assert tensorflow_internals.is_recording(), MOVED_TF.format("could_possibly_record")
        with tape.stop_recording():
            assert not tensorflow_internals.is_recording()


def test_graphs_are_told_apart():
    assert tensorflow_internals.current_graph() is None
    graphs = []

    @tf.function(autograph=False)
    def inner():
        graphs.append(tensorflow_internals.current_graph())

    @tf.function(autograph=False)
    def outer():
        graphs.append(tensorflow_internals.current_graph())
        inner()

    outer()
    assert tensorflow_internals.outer_graph(graphs[1]) is graphs[0], MOVED_TF.format("outer_graph")


def test_xla_is_noticed():
    seen = {}

    def note(key):
        seen[key] = tensorflow_internals.compiled_by_xla()
        return tf.ones(())

    assert not tensorflow_internals.compiled_by_xla()
    tf.function(lambda: note("plain"), autograph=False)()
    tf.function(lambda: note("xla"), autograph=False, jit_compile=True)()
    assert seen == {"plain": False, "xla": True}, MOVED_TF.format("GraphOrParentsInXlaContext")


def test_a_backward_pass_tells_what_it_is_for():
    one, other = keras.Variable(1.0), keras.Variable(2.0)
    seen = []

    @tf.custom_gradient
    def probe(tensor):
        def gradient(upstream):
            seen.append([tensorflow_internals.differentiates_for(v) for v in (one, other)])
            return upstream

        return tf.identity(tensor), gradient

    with tf.GradientTape() as tape:
        value = probe(one.value * other.value)
    tape.gradient(value, [one.value])
    assert seen == [[True, False]], MOVED_TF.format("imperative_grad")


def test_variables_are_made_while_a_function_is_traced():
    traces, made = [], []

    @tf.function(autograph=False)
    def step():
        traces.append(1)
        if not made:
            with tensorflow_internals.outside_of_the_trace():
                made.append(tf.Variable(3.0))
        return made[0] + 1.0

    assert float(step()) == 4.0
    assert len(traces) == 1, MOVED_TF.format("default_variable_creator_v2")


class Recording(WholeStepOptimizer):
    """Notes what its steps are given, and moves nothing."""

    def __init__(self, **options):
        super().__init__(learning_rate=0.5, name="recording", **options)
        self.steps = []

    def take_step(self, gradients, variables, learning_rate):
        self.steps.append((list(gradients), list(variables), float(learning_rate)))


def recorded(**options):
    """An optimizer after one step with gradients of norm 5 and 0.1, and its variables."""
    variables = [keras.Variable([3.0, 4.0], name="a"), keras.Variable([[1.0]], name="b")]
    optimizer = Recording(**options)
    optimizer.build(variables)
    gradients = [tf.constant([3.0, 4.0]), tf.constant([[0.1]])]
    optimizer.apply(gradients, variables)
    return optimizer, variables, gradients


def test_a_step_gets_all_gradients_at_once_as_they_are():
    optimizer, variables, gradients = recorded(clipnorm=1.0, weight_decay=0.1)
    assert len(optimizer.steps) == 1, MOVED_STEP.format("_backend_update_step")
    given, theirs, rate = optimizer.steps[0]
    assert rate == 0.5 and [v.shape for v in theirs] == [(2,), (1, 1)]
    np.testing.assert_array_equal(given[0], gradients[0], MOVED_STEP.format("_clip_gradients"))
    # Nobody has decayed them, either.
    decayed = MOVED_STEP.format("_apply_weight_decay")
    np.testing.assert_array_equal(variables[0], [3.0, 4.0], decayed)
    np.testing.assert_allclose(optimizer.clipped(given)[0], [0.6, 0.8], rtol=1e-6)
    plain, _, gradients = recorded()
    assert plain.clipped(gradients) is gradients, MOVED_STEP.format("what is clipped")


def test_an_optimizer_knows_its_variables_and_batches():
    optimizer, variables, _ = recorded(gradient_accumulation_steps=2, weight_decay=0.1)
    assert [v.name for v in optimizer.trained_variables] == ["a", "b"], MOVED_STEP.format(
        "_trainable_variables"
    )
    assert Recording().trained_variables == []
    assert [optimizer.index_of(v) for v in variables] == [0, 1], MOVED_STEP.format(
        "_get_variable_index"
    )
    assert int(optimizer.batches) == 1 and int(optimizer.iterations) == 0, MOVED_STEP.format(
        "_iterations"
    )
    excluding = Recording(weight_decay=0.1)
    excluding.exclude_from_weight_decay(var_names=["b"])
    excluding.build(variables)
    assert [excluding.may_decay(v) for v in variables] == [True, False], MOVED_STEP.format(
        "_use_weight_decay"
    )


def test_an_optimizer_forgets_a_variable_and_knows_its_strategy():
    strategy = tf.distribute.OneDeviceStrategy("/cpu:0")
    with strategy.scope():
        optimizer = Recording()
    own = optimizer.add_variable((), name="own")
    count = len(optimizer.variables)
    optimizer.forget_variable(own)
    assert len(optimizer.variables) == count - 1, MOVED_STEP.format("_untrack_variable")
    with optimizer.in_strategy():
        assert tf.distribute.get_strategy() is strategy, MOVED_STEP.format("_distribution_strategy")


def test_a_layer_tells_when_it_is_built_and_which_is_its_kernel():
    class Tells(TellsWhenBuilt, keras.layers.Dense):
        def when_built(self):
            self.told = kernel_of(self)

    layer = Tells(2)
    layer(np.ones((1, 3)))
    assert getattr(layer, "told", None) is layer.kernel, MOVED_LAYER.format("_post_build")
    # One that gets its class before it is built.
    late = keras.layers.Dense(2)
    late.__class__ = Tells
    late(np.ones((1, 3)))
    assert late.told is late.kernel, MOVED_LAYER.format("_post_build")
    late.enable_lora(1)
    assert kernel_of(late) is late.told, MOVED_LAYER.format("_kernel")


def test_what_is_wrong_with_fit_on_several_workers_is_found(monkeypatch):
    """Where Keras has learnt it, `keras_kfc._compat.multi_worker_fit` can go."""
    trainer = multi_worker_fit.trainer
    assert multi_worker_fit.reduces_numbers_along_an_axis()
    assert multi_worker_fit.reduces_structures()

    def right(values, strategy, reduction):
        return strategy.reduce("MEAN", values, axis=None)

    def build_by_parts(self, iterator=None, data_batch=None):
        for _, _, batches in iterator:
            for value in next(batches):
                self.distribute_strategy.reduce("MEAN", value, axis=None)

    monkeypatch.setattr(trainer, "reduce_per_replica", right)
    monkeypatch.setattr(trainer.TensorFlowTrainer, "_maybe_symbolic_build", build_by_parts)
    assert not multi_worker_fit.reduces_numbers_along_an_axis()
    assert not multi_worker_fit.reduces_structures()
