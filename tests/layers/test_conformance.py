"""Keras's own conformance checks of optimizers and layers, for KFC and its layers."""

import pathlib
import pickle
import shutil
import subprocess
import sys

import keras
import nets
import numpy as np
import pytest
import tensorflow as tf
from helpers import few
from keras.src import testing

import keras_kfc
from keras_kfc import KFC

KERAS_TESTS = pathlib.Path(testing.__file__).parents[1]
# Keras's tests find these classes where they look for Keras's own.
SWAP = """
import keras_kfc
from keras.src import layers

layers.Dense = keras_kfc.layers.Dense
layers.Conv2D = keras_kfc.layers.Conv2D
"""


@pytest.mark.nightly
def test_keras_own_tests_pass_with_these_layers(tmp_path):
    """LoRA, quantisation, sparse inputs, serialisation, invalid arguments and all."""
    for file in ("layers/core/dense_test.py", "layers/convolutional/conv_test.py"):
        shutil.copy(KERAS_TESTS / file, tmp_path)
    (tmp_path / "conftest.py").write_text(SWAP)
    options = ["-q", "-p", "no:cacheprovider", "-k", "not conv1d and not conv3d"]
    command = [sys.executable, "-m", "pytest", *options, str(tmp_path)]
    finished = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert finished.returncode == 0, finished.stdout[-4000:]
    assert "passed" in finished.stdout and "skipped" not in finished.stdout.splitlines()[-1]


class TestLayers(testing.TestCase):
    def test_conv2d(self):
        for options, shape, outputs in (
            ({"filters": 4, "kernel_size": 3}, (2, 6, 6, 2), (2, 4, 4, 4)),
            (
                {
                    "filters": 4,
                    "kernel_size": (3, 2),
                    "strides": 2,
                    "padding": "same",
                    "groups": 2,
                    "activation": "relu",
                    "kernel_regularizer": "l2",
                    "bias_regularizer": "l2",
                },
                (2, 6, 5, 2),
                (2, 3, 3, 4),
            ),
            (
                {"filters": 3, "kernel_size": 2, "dilation_rate": 2, "use_bias": False},
                (2, 6, 6, 1),
                (2, 4, 4, 3),
            ),
        ):
            self.run_layer_test(
                keras_kfc.layers.Conv2D,
                init_kwargs=options,
                input_shape=shape,
                expected_output_shape=outputs,
                expected_num_trainable_weights=2 if options.get("use_bias", True) else 1,
                expected_num_non_trainable_weights=0,
                expected_num_losses=2 if "kernel_regularizer" in options else 0,
                supports_masking=False,
            )

    def test_dense(self):
        for options, shape in (
            ({"units": 4, "use_bias": False, "activation": "relu"}, (2, 3)),
            ({"units": 5, "kernel_regularizer": "l2", "bias_regularizer": "l2"}, (2, 3, 4)),
        ):
            self.run_layer_test(
                keras_kfc.layers.Dense,
                init_kwargs=options,
                input_shape=shape,
                expected_output_shape=(*shape[:-1], options["units"]),
                expected_num_trainable_weights=2 if options.get("use_bias", True) else 1,
                expected_num_non_trainable_weights=0,
                expected_num_losses=2 if "kernel_regularizer" in options else 0,
                supports_masking=True,
            )


class TestOptimizer(testing.TestCase):
    """Without layers of its own, KFC is its fallback rule, as any optimizer of variables."""

    def variable(self):
        return keras.Variable([[1.0, 2.0], [3.0, 4.0]])

    def ones(self):
        return tf.ones((2, 2))

    def test_config(self):
        self.run_class_serialization_test(KFC())
        self.run_class_serialization_test(
            KFC(
                learning_rate=keras.optimizers.schedules.ExponentialDecay(0.1, 5, 0.5),
                damping=keras.optimizers.schedules.ExponentialDecay(0.1, 5, 0.5),
                polyak_scaling=None,
                fisher="exact",
                clipnorm=1.0,
                use_ema=True,
            )
        )

    def test_single_step(self):
        """The first step of an Adam: the learning rate against the gradient's sign."""
        variable = self.variable()
        optimizer = KFC(learning_rate=0.5, adam_lr_ratio=0.2, weight_decay=None)
        optimizer.apply_gradients([(self.ones(), variable)])
        self.assertAllClose(variable, [[0.9, 1.9], [2.9, 3.9]], atol=1e-4)

    def test_iterations_counter(self):
        variable, optimizer = self.variable(), KFC()
        for expected in (0, 1, 2):
            self.assertEqual(int(optimizer.iterations), expected)
            optimizer.apply_gradients([(self.ones(), variable)])

    def test_empty_gradients(self):
        first, second = self.variable(), self.variable()
        with self.assertRaisesRegex(ValueError, "No gradients provided for any variable."):
            KFC().apply_gradients([(None, first)])
        with self.assertWarns(Warning):
            KFC().apply_gradients([(None, first), (self.ones(), second)])
        self.assertAllClose(first, [[1.0, 2.0], [3.0, 4.0]])
        self.assertNotAllClose(second, [[1.0, 2.0], [3.0, 4.0]])

    def test_clip_arguments(self):
        for name in ("clipnorm", "clipvalue", "global_clipnorm"):
            self.assertEqual(getattr(KFC(**{name: 0.1}), name), 0.1)
        with self.assertRaisesRegex(ValueError, "Only one of `clipnorm`"):
            KFC(clipnorm=0.1, clipvalue=0.1)

    def test_weight_decay(self):
        """With a gradient of zero, decay alone moves a variable, unless it is excluded.

        Without a block it is a fifth of the argument, as in Keras's AdamW by default.
        """
        decayed, excluded = keras.Variable([[2.0]]), keras.Variable([[2.0]], name="exclude")
        optimizer = KFC(learning_rate=1.0, weight_decay=0.02, adam_lr_ratio=1.0)
        optimizer.exclude_from_weight_decay(var_names=["exclude"])
        optimizer.apply_gradients([(tf.zeros((1, 1)), v) for v in (decayed, excluded)])
        self.assertAllClose(decayed, [[2.0 * (1 - 0.004)]])
        self.assertAllClose(excluded, [[2.0]])

    def test_constraints_are_applied(self):
        variable = keras.Variable([[-1.0, 2.0]])
        variable.constraint = keras.constraints.NonNeg()
        KFC(weight_decay=None).apply_gradients([(tf.zeros((1, 2)), variable)])
        self.assertAllClose(variable, [[0.0, 2.0]])

    def test_get(self):
        optimizer = keras.optimizers.get({"class_name": "keras_kfc>KFC", "config": {"seed": 3}})
        self.assertIsInstance(optimizer, KFC)
        self.assertIs(keras.optimizers.get(optimizer), optimizer)

    def test_static_loss_scaling(self):
        plain, scaled = self.variable(), self.variable()
        optimizer = KFC(loss_scale_factor=1024.0)
        self.assertEqual(optimizer.scale_loss(1.0), 1024.0)
        optimizer.apply_gradients([(1024 * self.ones(), scaled)])
        KFC().apply_gradients([(self.ones(), plain)])
        self.assertAllClose(scaled, plain)

    def test_set_weights(self):
        variable, first, second = self.variable(), KFC(), KFC()
        first.apply_gradients([(self.ones(), variable)])
        with self.assertRaisesRegex(ValueError, "You are calling"):
            second.set_weights(first.variables)
        second.build([variable])
        second.set_weights(first.variables)
        for one, two in zip(first.variables, second.variables, strict=True):
            self.assertAllClose(one, two)

    def test_gradient_accumulation(self):
        whole, parts = self.variable(), self.variable()
        accumulating, plain = KFC(gradient_accumulation_steps=3), KFC()
        for _ in range(2):
            gradients = np.random.default_rng(0).normal(size=(3, 2, 2)).astype("float32")
            plain.apply_gradients([(tf.constant(gradients.mean(0)), whole)])
            for gradient in gradients:
                accumulating.apply_gradients([(tf.constant(gradient), parts)])
        self.assertEqual(int(accumulating.iterations), 2)
        self.assertAllClose(parts, whole)

    def test_callable_learning_rate(self):
        variable, same = self.variable(), self.variable()
        KFC(learning_rate=lambda: 0.1).apply_gradients([(self.ones(), variable)])
        KFC(learning_rate=0.1).apply_gradients([(self.ones(), same)])
        self.assertAllClose(variable, same)

    def test_schedules_untrack_the_variables_they_replace(self):
        optimizer = KFC()
        before = len(optimizer.variables)
        optimizer.learning_rate = keras.optimizers.schedules.PolynomialDecay(0.1, 4)
        self.assertLen(optimizer.variables, before - 1)
        optimizer.damping = keras.optimizers.schedules.PolynomialDecay(0.1, 4)
        self.assertLen(optimizer.variables, before - 2)

    def test_overwrite_with_gradient(self):
        overwritten, other = self.variable(), self.variable()
        overwritten.overwrite_with_gradient = True
        KFC().apply_gradients([(self.ones(), overwritten), (self.ones(), other)])
        self.assertAllClose(overwritten, [[1.0, 1.0], [1.0, 1.0]])
        self.assertNotAllClose(other, overwritten)

    def test_pickle(self):
        optimizer = KFC(damping=0.3, seed=4)
        self.assertEqual(pickle.loads(pickle.dumps(optimizer)).get_config(), optimizer.get_config())

    def test_names(self):
        self.assertEqual([KFC().name, KFC().name, KFC(name="mine").name], ["kfc", "kfc_1", "mine"])
        again = keras.optimizers.deserialize(keras.optimizers.serialize(KFC(name="mine")))
        self.assertEqual(again.name, "mine")

    def test_mixed_with_tf_variables(self):
        variable, plain = self.variable(), tf.Variable([[1.0, 2.0], [3.0, 4.0]])
        optimizer = KFC()
        optimizer.apply_gradients([(self.ones(), variable), (self.ones(), plain)])
        self.assertAllClose(variable, plain)


@pytest.mark.nightly
def test_a_whole_model_is_pickled_with_its_optimizer():
    model = nets.conv_net()
    nets.train(model, KFC(seed=3), steps=2)
    copy = pickle.loads(pickle.dumps(model))
    assert len(copy.optimizer.blocks) == 2
    for one, two in zip(model.optimizer.variables, copy.optimizer.variables, strict=True):
        np.testing.assert_array_equal(one.numpy(), two.numpy())


@pytest.mark.parametrize("prepare", few(["instrumented", "built from keras_kfc.layers"], 0))
def test_a_trained_model_is_quantised_as_the_plain_one(prepare):
    images, _ = nets.image_batch(seed=5)
    plain = nets.conv_net(keras.layers)
    if prepare == "instrumented":
        model = keras_kfc.instrument(nets.conv_net(keras.layers))
    else:
        model = nets.conv_net()
    nets.train(model, KFC(), steps=2)
    plain.set_weights(model.get_weights())
    for each in (plain, model):
        each.quantize("int8")
    assert type(model.get_layer("dense")) is keras.layers.Dense
    # Keras quantises no convolution, which stays what it is.
    assert type(model.get_layer("conv")) is keras_kfc.layers.Conv2D
    assert model.get_layer("dense").quantization_mode == "int8"
    np.testing.assert_array_equal(
        model.predict(images, verbose=0), plain.predict(images, verbose=0)
    )
    keras_kfc.instrument(model)
    assert "quantised" in str(keras_kfc.coverage(model))


def test_low_rank_adapters_train_by_the_fallback_rule_on_a_frozen_kernel():
    model = nets.conv_net()
    model.get_layer("dense").enable_lora(2)
    kernel = model.get_layer("dense")._kernel.numpy()
    nets.train(model, KFC(), steps=3)
    np.testing.assert_array_equal(model.get_layer("dense")._kernel.numpy(), kernel)
    assert np.abs(model.get_layer("dense").lora_kernel_b.numpy()).max() > 0
    assert [block.path.split("/")[-1] for block in model.optimizer.blocks] == ["conv"]


@pytest.mark.parametrize("prepare", [keras_kfc.instrument, lambda model: model])
@pytest.mark.nightly
def test_a_quantisation_that_fails_leaves_the_layer_instrumented(prepare):
    model = prepare(
        nets.conv_net(keras.layers if prepare is keras_kfc.instrument else keras_kfc.layers)
    )
    nets.train(model, KFC(), steps=1)
    with pytest.raises(ValueError):
        model.get_layer("dense").quantize("nonsense")
    with pytest.raises(ValueError):
        # Refused only once the layer is being quantised.
        model.get_layer("dense").quantize("gptq")
    # The net has a batch normalisation, which is Keras's own unless the model was instrumented.
    covered = keras_kfc.coverage(model).covered
    assert "dense" in covered[-1] and len(covered) == 2 + (prepare is keras_kfc.instrument)
    model.train_on_batch(*nets.image_batch(7))
