"""Positions of patches, which form is chosen, and arguments that are refused."""

import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf
from naive_moments import naive_moment, normal

from conftest import naive_patches, output_geometry
from keras_kfc.patches.costs import cheapest_views
from keras_kfc.patches.geometry import axis_of, row_plan
from keras_kfc.patches.im2col import extract_patches
from keras_kfc.patches.moment import FORMS, patch_second_moment


@pytest.mark.parametrize("form", [None, *FORMS])
def test_kernel_that_fits_nowhere_has_no_patches(form):
    moment, total = patch_second_moment(np.ones((2, 3, 9, 2)), (5, 2), form=form)
    assert moment.shape == (1, 20, 20)
    assert not np.any(moment)
    assert not np.any(total)


def test_patches_are_in_the_order_of_the_kernel():
    image = normal(5, 6, 2)
    rows = extract_patches(tf.constant(image[None]), (2, 3), padding="same")
    expected = np.stack(list(naive_patches(image, (2, 3), (1, 1), "same", (1, 1))))
    np.testing.assert_array_equal(rows[0], expected)


def test_geometry_is_that_of_the_convolution():
    for size, kernel, stride, dilation, padding in itertools.product(
        (1, 2, 7, 8), (1, 2, 3, 5), (1, 2, 3), (1, 2), ("same", "valid")
    ):
        if min(stride, dilation) > 1 or (padding == "valid" and dilation * (kernel - 1) >= size):
            continue
        axis = axis_of(size, kernel, stride, padding, dilation)
        layer = keras.layers.Conv1D(
            1, kernel, strides=stride, dilation_rate=dilation, padding=padding
        )
        outputs, before = output_geometry(size, kernel, stride, padding, dilation)
        assert axis.outputs == outputs == layer.compute_output_shape((1, size, 1))[1]
        assert axis.offsets[0] == -before


def test_equal_distances_share_a_sum():
    """The point of the autocorrelation: one whole sum for each distance of taps."""
    plan = row_plan(axis_of(16, 5, 1, "same", 1))
    assert sum(part.row is None for part in plan.sums) == 5
    assert sum(part.row is not None for part in plan.sums) == 6
    assert len(plan.pairs) == 15


def test_rounded_products_of_a_gpu_are_of_patches_only(monkeypatch):
    axis = axis_of(32, 3, 1, "same", 1)
    assert cheapest_views(axis, axis, 1, 64)[0].columns_first
    monkeypatch.setattr(tf.config, "list_logical_devices", lambda kind: ["a GPU"])
    assert tf.config.experimental.tensor_float_32_execution_enabled()
    assert cheapest_views(axis, axis, 1, 64) is None
    monkeypatch.setattr(tf.config.experimental, "tensor_float_32_execution_enabled", lambda: False)
    assert cheapest_views(axis, axis, 1, 64)[0].columns_first


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "dilation", "channels", "chosen"),
    [
        ((32, 32), (3, 3), 1, 1, 64, "spectral"),
        ((28, 28), (5, 5), 1, 1, 1, "windows"),
        ((32, 32), (3, 3), 2, 1, 16, "windows"),
        ((14, 14), (1, 1), 1, 1, 256, "im2col"),
        ((33, 33), (3, 3), 1, 18, 2048, "im2col"),
        ((1, 16000), (1, 512), 1, 1, 1, "im2col"),
    ],
)
def test_each_form_is_chosen_where_it_is_cheapest(size, kernel, stride, dilation, channels, chosen):
    """And nothing large is made on the way to the choice."""
    rows, columns = (
        axis_of(length, taps, stride, "same", dilation)
        for length, taps in zip(size, kernel, strict=True)
    )
    views = cheapest_views(rows, columns, 1, channels)
    form = "im2col" if views is None else "spectral" if views[0].columns_first else "windows"
    assert form == chosen


def test_long_kernels_work_or_say_that_a_form_cannot():
    images = normal(1, 1, 700, 1)
    moment, _ = patch_second_moment(images, (1, 300))
    expected, _ = naive_moment(images, (1, 300), (1, 1), "valid", (1, 1))
    np.testing.assert_allclose(moment[0], expected, atol=1e-10)
    with pytest.raises(ValueError, match="`form`"):
        patch_second_moment(images, (1, 300), form="windows")


@pytest.mark.parametrize(
    ("name", "error", "options"),
    [
        ("kernel_size", ValueError, {"kernel_size": 0}),
        ("kernel_size", ValueError, {"kernel_size": (3, 3, 3)}),
        ("kernel_size", TypeError, {"kernel_size": 2.5}),
        ("strides", TypeError, {"strides": "2"}),
        ("dilation_rate", ValueError, {"dilation_rate": (1, -1)}),
        ("padding", ValueError, {"padding": "causal"}),
        ("data_format", ValueError, {"data_format": "NHWC"}),
        ("groups", ValueError, {"groups": 2}),
        ("groups", TypeError, {"groups": 1.5}),
        ("form", ValueError, {"form": "winograd"}),
        ("inputs", ValueError, {"inputs": np.ones((2, 8, 8))}),
    ],
)
def test_bad_arguments_are_refused_by_name(name, error, options):
    options = {"inputs": np.ones((2, 8, 8, 3)), "kernel_size": 3, **options}
    with pytest.raises(error, match=f"`{name}`"):
        patch_second_moment(**options)


def test_a_form_that_needs_sizes_says_so():
    function = tf.function(
        lambda images: patch_second_moment(images, 3, form="spectral"),
        input_signature=[tf.TensorSpec((None, None, None, 3))],
        autograph=False,
    )
    with pytest.raises(ValueError, match="`form`"):
        function.get_concrete_function()
