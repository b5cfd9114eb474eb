"""Conv3D: its factors by explicit loops, its layer Keras's own."""

import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import few

import keras_kfc
from conftest import naive_gamma, output_geometry, relative_error
from keras_kfc.curvature.diagonal import DiagonalLayout
from keras_kfc.maps.api import input_factor, output_factor
from keras_kfc.maps.conv3d import Conv3DMap
from keras_kfc.patches import volumes

SHAPE = (6, 5, 4, 4)
OPTIONS = [
    {"kernel_size": (2, 3, 2)},
    {"kernel_size": (3, 2, 1), "strides": (2, 1, 2), "padding": "same"},
    {"kernel_size": (1, 2, 3), "strides": (3, 2, 1)},
    {"kernel_size": 2, "dilation_rate": (2, 1, 3)},
    {"kernel_size": (2, 3, 2), "dilation_rate": (3, 2, 1), "padding": "same", "use_bias": False},
    {"kernel_size": (4, 1, 2), "padding": "same", "groups": 2},
    {"kernel_size": (2, 1, 1), "strides": (3, 1, 1), "groups": 4},
    {"kernel_size": 1, "strides": 2},
]


def triple(value):
    return (value,) * 3 if isinstance(value, int) else value


def map_of(options, inputs=4, outputs=8, data_format="channels_last"):
    return Conv3DMap(
        triple(options["kernel_size"]),
        inputs,
        outputs,
        triple(options.get("strides", 1)),
        options.get("padding", "valid"),
        triple(options.get("dilation_rate", 1)),
        options.get("groups", 1),
        data_format,
    )


def naive_patches(volume, options, channels):
    """Yields the patch of each output position of one example, from the definition."""
    volume = volume[..., channels]
    kernel_size, strides, dilation = (
        triple(options.get(name, 1)) for name in ("kernel_size", "strides", "dilation_rate")
    )
    padding = options.get("padding", "valid")
    geometry = [
        output_geometry(*axis, padding, rate)
        for *axis, rate in zip(volume.shape[:3], kernel_size, strides, dilation, strict=True)
    ]
    for position in itertools.product(*(range(count) for count, _ in geometry)):
        patch = []
        for taps in itertools.product(*map(range, kernel_size)):
            place = tuple(
                t * stride + tap * rate - before
                for t, stride, tap, rate, (_, before) in zip(
                    position, strides, taps, dilation, geometry, strict=True
                )
            )
            inside = all(0 <= p < size for p, size in zip(place, volume.shape[:3], strict=True))
            patch.extend(volume[place] if inside else np.zeros(volume.shape[-1]))
        yield np.array(patch)


def naive_rows(x, options, group=0):
    """Patches of a group, of all positions and examples."""
    width = x.shape[-1] // options.get("groups", 1)
    channels = slice(group * width, (group + 1) * width)
    return np.array([patch for volume in x for patch in naive_patches(volume, options, channels)])


def naive_omega(x, options, group=0):
    rows = naive_rows(x, options, group)
    if options.get("use_bias", True):
        rows = np.column_stack([rows, np.ones(len(rows))])
    return sum(np.outer(row, row) for row in rows) / len(x)


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
@pytest.mark.parametrize("options", OPTIONS)
def test_factors_are_those_of_the_definition(options, data_format):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3, *SHAPE))
    derivatives = rng.normal(size=keras.layers.Conv3D(8, **options).compute_output_shape(x.shape))
    groups, use_bias = options.get("groups", 1), options.get("use_bias", True)
    linear_map = map_of(options, data_format=data_format)
    inputs, back = x, derivatives
    if data_format == "channels_first":
        inputs, back = (np.moveaxis(array, -1, 1) for array in (x, derivatives))
    omega = input_factor(linear_map, [tf.constant(inputs)], tf.constant(3), use_bias).numpy()
    gamma = output_factor(linear_map, [tf.constant(back)]).numpy()
    rows = linear_map.input_rows(tf.constant(inputs))
    derivative_rows = linear_map.derivative_rows(tf.constant(back))
    columns = 8 // groups
    for group in range(groups):
        own = derivatives[..., group * columns : (group + 1) * columns]
        assert relative_error(omega[group], naive_omega(x, options, group)) < 1e-12
        assert relative_error(gamma[group], naive_gamma(own)) < 1e-12
        np.testing.assert_array_equal(rows[group], naive_rows(x, options, group))
        np.testing.assert_array_equal(derivative_rows[group], own.reshape(-1, columns))
    assert linear_map.count_positions(tf.constant(inputs)) == rows.shape[1]


@pytest.mark.parametrize(("options", "parts"), [(OPTIONS[0], 3), (OPTIONS[5], 2)])
def test_parts_are_blocks_of_the_whole_moment(options, parts):
    x = np.random.default_rng(0).normal(size=(3, *SHAPE))
    linear_map = map_of(options)
    whole, whole_sum = (part.numpy() for part in linear_map.input_moments(tf.constant(x)))
    moment, total = (part.numpy() for part in linear_map.input_moments(tf.constant(x), parts))
    channels = 4 // linear_map.groups
    width, taps = -(-channels // parts), linear_map.kernel_rows // channels
    assert moment.shape == (linear_map.groups * parts, taps * width, taps * width)
    for group, part in itertools.product(range(linear_map.groups), range(parts)):
        own = [c for c in range(part * width, (part + 1) * width) if c < channels]
        rows = [tap * channels + c for tap in range(taps) for c in own]
        filled = [tap * width + c - part * width for tap in range(taps) for c in own]
        expected = np.zeros(moment.shape[1:])
        expected[np.ix_(filled, filled)] = whole[group][np.ix_(rows, rows)]
        np.testing.assert_allclose(moment[group * parts + part], expected, atol=1e-10)
        np.testing.assert_allclose(
            total[group * parts + part][filled], whole_sum[group][rows], atol=1e-12
        )


@pytest.mark.parametrize("batch", few([4, 1, 7], 1))
@pytest.mark.parametrize("options", [OPTIONS[0], OPTIONS[1], OPTIONS[5]])
@pytest.mark.parametrize("how", ["eager", "graph", "graph of unknown sizes", "xla"])
def test_slices_of_the_batch_sum_up_to_the_whole(options, batch, how, monkeypatch):
    x = np.random.default_rng(0).normal(size=(batch, *SHAPE))
    expected = [naive_rows(x, options, group) for group in range(options.get("groups", 1))]
    held = []

    def spy(images, *args):
        held.append(images.shape)
        return patch_second_moment(images, *args)

    patch_second_moment = volumes.patch_second_moment
    monkeypatch.setattr(volumes, "patch_second_moment", spy)
    depths = keras.layers.Conv3D(8, **options).compute_output_shape(x.shape)[1]
    # Two volumes with their planes laid behind each other, and a bit.
    numbers = options["kernel_size"][0] * depths * np.prod(SHAPE[1:])
    monkeypatch.setattr(volumes, "_SLICE_BYTES", int(8 * 2.5 * numbers))
    moments = map_of(options).input_moments
    if how != "eager":
        unknown = (None,) * 3 if "unknown" in how else SHAPE[:3]
        signature = [tf.TensorSpec((None, *unknown, 4), tf.float64)]
        moments = tf.function(moments, autograph=False, input_signature=signature)
    if how == "xla":
        moments = tf.function(map_of(options).input_moments, autograph=False, jit_compile=True)
    moment, total = moments(tf.constant(x))
    for group, rows in enumerate(expected):
        assert relative_error(moment[group], rows.T @ rows) < 1e-12
        assert relative_error(total[group], rows.sum(axis=0)) < 1e-12
    if how == "eager":
        assert max(np.prod(shape) for shape in held) <= 2 * numbers
        assert len(held) == -(-batch // 2)


def test_half_precision_is_summed_in_float32():
    x = tf.constant(np.random.default_rng(0).normal(size=(3, *SHAPE)), tf.float16)
    linear_map = map_of(OPTIONS[1])
    results = (*linear_map.input_moments(x), linear_map.input_rows(x))
    expected = naive_rows(x.numpy().astype("float64"), OPTIONS[1])
    assert all(part.dtype == tf.float32 for part in results)
    assert relative_error(results[0][0], expected.T @ expected) < 1e-6
    np.testing.assert_array_equal(results[2][0], expected)


def test_rows_of_the_weights_match_the_patches():
    """The pre-activation is the patch with a one, times the weights with bias."""
    rng = np.random.default_rng(1)
    x = rng.normal(size=(1, 2, 3, 2, 4))
    layer = keras_kfc.layers.Conv3D(5, (2, 3, 2), bias_initializer="ones", dtype="float64")
    s = layer(x).numpy()[0, 0, 0, 0]
    weights = layer.linear_map.stack_bias(layer.kernel.value, layer.bias.value).numpy()[0]
    np.testing.assert_allclose(np.append(x[0].ravel(), 1.0) @ weights, s)
    kernel, bias = layer.linear_map.unstack_bias(tf.constant(weights[None]))
    np.testing.assert_array_equal(kernel, layer.kernel)
    np.testing.assert_array_equal(bias, layer.bias)


@pytest.mark.nightly
@pytest.mark.parametrize(
    "options",
    few(
        [OPTIONS[5], {**OPTIONS[0], "data_format": "channels_first"}, *OPTIONS[:5], *OPTIONS[6:]], 1
    ),
)
def test_the_layer_computes_and_trains_as_keras_own(options):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(6, *SHAPE)).astype("float32")
    y = rng.normal(size=(6, 1)).astype("float32")
    results = []
    for kind in (keras.layers.Conv3D, keras_kfc.layers.Conv3D):
        keras.utils.set_random_seed(5)
        layer = kind(8, activation="tanh", **options)
        pooled = keras.layers.GlobalAveragePooling3D(data_format=options.get("data_format"))
        model = keras.Sequential([keras.Input(SHAPE), layer, pooled, keras.layers.Dense(1)])
        model.compile("adam", "mse", run_eagerly=True)
        model.fit(x, y, epochs=2, shuffle=False, verbose=0)
        results.append([model(x).numpy(), *model.get_weights()])
    for plain, capturing in zip(*results, strict=True):
        np.testing.assert_array_equal(capturing, plain)
    config = layer.get_config()
    assert keras_kfc.layers.Conv3D.from_config(config).get_config() == config


def test_a_capture_sees_what_comes_before_the_activation():
    x = tf.constant(np.random.default_rng(1).normal(size=(2, *SHAPE)))
    layer = keras_kfc.layers.Conv3D(3, 2, activation="tanh", dtype="float64")
    with keras_kfc.Capture() as capture:
        outputs = layer(x)
    ((use,),) = [record.uses for record in capture.records.values()]
    np.testing.assert_array_equal(tf.tanh(use.pre_activation), outputs)


@pytest.mark.nightly
@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
def test_a_model_is_instrumented_and_has_the_factors_of_its_data(data_format):
    rng = np.random.default_rng(2)
    x = rng.normal(size=(8, *SHAPE)).astype("float32")
    inputs = np.moveaxis(x, -1, 1) if data_format == "channels_first" else x
    layer = keras.layers.Conv3D(3, 3, data_format=data_format, name="conv")
    model = keras.Sequential([keras.Input(inputs.shape[1:]), layer])
    keras_kfc.instrument(model)
    assert keras_kfc.coverage(model).covered == [model.layers[0].path]
    model.compile(keras_kfc.KFC(fisher="exact", curvature_update_period=1), "mse", run_eagerly=True)
    model.train_on_batch(inputs, np.zeros(model(inputs).shape))
    (block,) = model.optimizer.blocks
    assert relative_error(block.omega[0], naive_omega(x, {"kernel_size": 3})) < 1e-5
    # Of mean squares over 4 * 3 * 2 positions and 3 outputs: 2 / 72 for each example's sum.
    assert relative_error(block.gamma[0], np.eye(3) * 2 / 72) < 1e-5


def test_the_diagonal_is_the_mean_square_of_derivatives():
    rng = np.random.default_rng(2)
    x, options = rng.normal(size=(3, *SHAPE)), OPTIONS[1]
    ds = rng.normal(size=keras.layers.Conv3D(8, **options).compute_output_shape(x.shape))
    layout = DiagonalLayout(map_of(options), True)
    (measured,) = layout.from_pass([tf.constant(x)], [tf.constant(ds)], tf.constant(3), [None])
    expected = 0.0
    for volume, derivative in zip(x, ds, strict=True):
        rows = naive_rows(volume[None], options)
        rows = np.column_stack([rows, np.ones(len(rows))])
        expected = expected + (rows.T @ derivative.reshape(len(rows), -1)) ** 2 / len(x)
    assert relative_error(measured[0], expected) < 1e-12


@pytest.mark.slow
def test_a_model_is_saved_and_loaded_with_its_layer(tmp_path):
    x = np.random.default_rng(2).normal(size=(4, *SHAPE)).astype("float32")
    model = keras.Sequential([keras.Input(SHAPE), keras_kfc.layers.Conv3D(3, 2)])
    model.compile(keras_kfc.KFC(curvature_update_period=1), "mse")
    model.fit(x, np.zeros(model(x).shape), verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert type(loaded.layers[0]) is keras_kfc.layers.Conv3D
    np.testing.assert_array_equal(loaded(x), model(x))
    omegas = [one.optimizer.blocks[0].omega.numpy() for one in (loaded, model)]
    np.testing.assert_array_equal(*omegas)


@pytest.mark.slow
def test_a_net_of_convolutions_learns_faster_than_with_the_fallback_rule():
    rng = np.random.default_rng(3)
    x = rng.normal(size=(128, 5, 4, 4, 2)).astype("float32")
    y = np.tanh(x[:, 2:, 1:, 1:, :1] * x[:, 1:-1, :-1, 1:, :1] - x[:, :-2, 1:, :-1, 1:])

    def loss(exclude):
        keras.utils.set_random_seed(1)
        first = keras.layers.Conv3D(8, (3, 2, 2), activation="tanh")
        stack = [first, keras.layers.Conv3D(1, 1)]
        model = keras.Sequential([keras.Input(x.shape[1:]), *stack])
        keras_kfc.instrument(model, exclude=[layer.name for layer in stack] if exclude else [])
        model.compile(keras_kfc.KFC(seed=1), "mse")
        model.optimizer.build(model.trainable_variables)
        return model.fit(x, y, batch_size=32, epochs=10, verbose=0).history["loss"][-1]

    assert loss(exclude=False) < 0.8 * loss(exclude=True)
