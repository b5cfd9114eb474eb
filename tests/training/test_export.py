"""An instrumented model is exported as the plain Keras model that it stands for.

Variables and operations are counted, in SavedModel, `ExportArchive`, TFLite and ONNX, and served
predictions compared to the bit, in a process that cannot import keras_kfc.
"""

import collections

import keras
import nets
import numpy as np
import onnx
import onnxruntime
import pytest
import tensorflow as tf
from helpers import few, run_python
from tensorflow.core.protobuf import saved_model_pb2

import keras_kfc

# Serves what is in the folders given, where keras_kfc cannot be imported.
SERVE = """
import sys
sys.modules["keras_kfc"] = None
import numpy as np
import tensorflow as tf
images = np.load(sys.argv[1])
for folder in sys.argv[2:]:
    model = tf.saved_model.load(folder)
    np.save(folder + ".npy", model.serve(images).numpy())
"""


@pytest.fixture(scope="module")
def models():
    """The plain model, the instrumented one it became by training, and that one stripped."""
    images, labels = nets.image_batch()
    instrumented = keras_kfc.instrument(nets.conv_net(keras.layers))
    instrumented.compile(keras_kfc.KFC(), "sparse_categorical_crossentropy")
    instrumented.fit(images, labels, epochs=2, verbose=0)
    weights = instrumented.get_weights()
    plain = nets.conv_net(keras.layers)
    plain.compile("sgd", "sparse_categorical_crossentropy")
    plain.fit(images, labels, epochs=1, verbose=0)
    plain.set_weights(weights)
    stripped = keras_kfc.instrument(nets.conv_net(keras.layers))
    stripped.compile(keras_kfc.KFC(), "sparse_categorical_crossentropy")
    stripped.fit(images, labels, epochs=1, verbose=0)
    stripped.set_weights(weights)
    return {
        "plain": plain,
        "instrumented": instrumented,
        "stripped": keras_kfc.strip(stripped),
    }


def operations(graph_def):
    """How often each kind of operation occurs, in functions too."""
    counts = collections.Counter(node.op for node in graph_def.node)
    for function in graph_def.library.function:
        counts.update(node.op for node in function.node_def)
    return counts


def saved_operations(folder):
    content = (folder / "saved_model.pb").read_bytes()
    message = saved_model_pb2.SavedModel.FromString(content)
    return operations(message.meta_graphs[0].graph_def)


def saved_variables(folder):
    entries = tf.train.list_variables(str(folder / "variables" / "variables"))
    return sorted(tuple(shape) for name, shape in entries if "OBJECT_GRAPH" not in name)


def by_model_export(model, folder):
    model.export(folder, verbose=False)


def by_export_archive(model, folder):
    archive = keras.export.ExportArchive()
    archive.track(model)
    archive.add_endpoint(
        "serve", model.call, input_signature=[tf.TensorSpec((None, 8, 8, 2), tf.float32)]
    )
    archive.write_out(folder, verbose=False)


@pytest.mark.parametrize(
    "export", [by_model_export, pytest.param(by_export_archive, marks=pytest.mark.nightly)]
)
@pytest.mark.slow
def test_saved_model_is_that_of_the_plain_model(export, models, tmp_path):
    images, _ = nets.image_batch(seed=5)
    np.save(tmp_path / "images.npy", images)
    for name, model in models.items():
        export(model, tmp_path / name)
    for name in ("instrumented", "stripped"):
        assert saved_variables(tmp_path / name) == saved_variables(tmp_path / "plain")
        assert saved_operations(tmp_path / name) == saved_operations(tmp_path / "plain")
    assert saved_operations(tmp_path / "plain")["Conv2D"]
    folders = [str(tmp_path / name) for name in models]
    served = run_python(SERVE, tmp_path / "images.npy", *folders)
    assert served.returncode == 0, served.stderr
    expected = np.load(tmp_path / "plain.npy")
    np.testing.assert_allclose(models["plain"].predict(images, verbose=0), expected, rtol=1e-5)
    for name in ("instrumented", "stripped"):
        np.testing.assert_array_equal(np.load(tmp_path / f"{name}.npy"), expected)


@pytest.mark.slow
def test_a_model_in_training_mode_would_show(models, tmp_path):
    """Negative control: the counts see an additional operation."""
    plain, other = models["plain"], models["instrumented"]
    outputs = keras.layers.ReLU(name="additional")(other.outputs[0])
    by_model_export(plain, tmp_path / "plain")
    by_model_export(keras.Model(other.inputs, outputs), tmp_path / "other")
    assert saved_operations(tmp_path / "other") != saved_operations(tmp_path / "plain")


def tflite_predictions(content, images):
    interpreter = tf.lite.Interpreter(model_content=content)
    interpreter.resize_tensor_input(interpreter.get_input_details()[0]["index"], images.shape)
    interpreter.allocate_tensors()
    interpreter.set_tensor(interpreter.get_input_details()[0]["index"], images)
    interpreter.invoke()
    kinds = collections.Counter(d["op_name"] for d in interpreter._get_ops_details())
    return interpreter.get_tensor(interpreter.get_output_details()[0]["index"]), kinds


def by_converter(model, tmp_path):
    return tf.lite.TFLiteConverter.from_keras_model(model).convert()


def by_litert_export(model, tmp_path):
    model.export(tmp_path / "model.tflite", format="litert", verbose=False)
    return (tmp_path / "model.tflite").read_bytes()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("convert", few([by_converter, by_litert_export], 1))
def test_tflite_is_that_of_the_plain_model(convert, models, tmp_path):
    images, _ = nets.image_batch(seed=5)
    expected, kinds = tflite_predictions(convert(models["plain"], tmp_path), images)
    assert kinds["CONV_2D"] == 1
    for name in ("instrumented", "stripped"):
        predictions, other_kinds = tflite_predictions(convert(models[name], tmp_path), images)
        np.testing.assert_array_equal(predictions, expected)
        assert other_kinds == kinds


# From one conversion to the next, tf2onnx folds the shape of a Flatten or leaves it, in plain
# Keras models, too.
SHAPE_ARITHMETIC = {"Cast", "Concat", "Gather", "Shape", "Slice"}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_onnx_is_that_of_the_plain_model(models, tmp_path):
    images, _ = nets.image_batch(seed=5)
    outputs, kinds = {}, {}
    for name, model in models.items():
        path = str(tmp_path / f"{name}.onnx")
        model.export(path, format="onnx", verbose=False)
        session = onnxruntime.InferenceSession(path)
        outputs[name] = session.run(None, {session.get_inputs()[0].name: images})[0]
        kinds[name] = collections.Counter(
            node.op_type
            for node in onnx.load(path).graph.node
            if node.op_type not in SHAPE_ARITHMETIC
        )
    np.testing.assert_allclose(
        outputs["plain"], models["plain"].predict(images, verbose=0), rtol=1e-4, atol=1e-6
    )
    for name in ("instrumented", "stripped"):
        np.testing.assert_array_equal(outputs[name], outputs["plain"])
        assert kinds[name] == kinds["plain"]
