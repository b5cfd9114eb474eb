"""Every form of the patch second moment against naive loops over positions, in float64."""

import functools
import itertools

import numpy as np
import pytest
import tensorflow as tf
from helpers import few
from naive_moments import naive_moment, normal

from conftest import relative_error
from keras_kfc.patches import im2col, moment
from keras_kfc.patches.autocorrelation import second_moment
from keras_kfc.patches.geometry import axis_of
from keras_kfc.patches.moment import FORMS, patch_second_moment
from keras_kfc.patches.row_views import spectral_views, window_views

KERNELS = [(1, 1), (2, 2), (3, 3), (5, 5), (2, 3), (3, 1), (1, 4)]
# Strides larger than the kernel, kernels larger than the map, maps of one pixel.
STRIDES_AND_DILATIONS = [
    ((1, 1), (1, 1)),
    ((2, 2), (1, 1)),
    ((1, 3), (1, 1)),
    ((4, 3), (1, 1)),
    ((1, 1), (2, 2)),
    ((1, 1), (1, 3)),
    ((1, 1), (4, 2)),
]
SIZES = [(9, 8), (6, 7), (3, 2), (1, 1), (1, 5)]
CASES = [
    (kernel, strides, padding, dilation, size)
    for kernel, (strides, dilation), padding, size in itertools.product(
        KERNELS, STRIDES_AND_DILATIONS, ("same", "valid"), SIZES
    )
    if padding == "same"
    or all((k - 1) * d < n for k, d, n in zip(kernel, dilation, size, strict=True))
]


@functools.cache
def expected_of(case, channels):
    kernel, strides, padding, dilation, size = case
    return naive_moment(normal(2, *size, channels), kernel, strides, padding, dilation)


@pytest.mark.slow
@pytest.mark.usefixtures("eager_functions")
@pytest.mark.parametrize("form", FORMS)
def test_every_form_equals_loops_over_positions(form):
    for case in CASES:
        kernel, strides, padding, dilation, size = case
        moment, total = expected_of(case, 2)
        result = patch_second_moment(
            normal(2, *size, 2), kernel, strides, padding, dilation, form=form
        )
        assert result[0].dtype == result[1].dtype == tf.float64
        np.testing.assert_allclose(result[0][0], moment, atol=1e-11, err_msg=str((form, case)))
        np.testing.assert_allclose(result[1][0], total, atol=1e-11, err_msg=str((form, case)))


def test_a_moment_with_one_border_row_too_many_would_be_told():
    """Negative control of the tolerance above: 'same' and 'valid' differ by border rows only."""
    images = normal(2, 9, 8, 2)
    same, _ = patch_second_moment(images, 3, padding="same")
    valid, _ = patch_second_moment(images, 3, padding="valid")
    assert np.abs(same - valid).max() > 1


@pytest.mark.parametrize("outputs_per_window", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("case", [((3, 3), 1, 1), ((2, 5), 1, 1), ((5, 3), 2, 1), ((3, 2), 1, 3)])
def test_windows_of_every_width_and_spectra_in_parts_are_exact(outputs_per_window, case):
    """Whatever the cost model would choose."""
    kernel, stride, dilation = case
    images = normal(2, 9, 11, 2)
    for padding in ("same", "valid"):
        moment, _ = naive_moment(images, kernel, (stride,) * 2, padding, (dilation,) * 2)
        rows, columns = (
            axis_of(size, taps, stride, padding, dilation)
            for size, taps in zip((9, 11), kernel, strict=True)
        )
        grouped = tf.constant(images[:, :, :, None])
        for views in (
            window_views(columns, min(outputs_per_window, columns.outputs)),
            spectral_views(columns, outputs_per_window),
        ):
            result = second_moment(grouped, rows, columns, views)
            np.testing.assert_allclose(result[0], moment, atol=1e-11)


@pytest.mark.parametrize("form", FORMS)
def test_a_faint_group_beside_a_bright_one_is_as_exact_as_by_itself(form):
    """Sums of one group must not come out of differences of sums with another in them."""
    images = normal(8, 9, 9, 4) * np.array([1.0, 1.0, 1e5, 1e5])
    moment, _ = patch_second_moment(
        tf.constant(images, tf.float32), 5, padding="same", groups=2, form=form
    )
    for group, channels in enumerate((slice(0, 2), slice(2, 4))):
        expected, _ = naive_moment(images, (5, 5), (1, 1), "same", (1, 1), channels)
        error = np.abs(moment[group] - expected).max() / np.abs(expected).max()
        assert error < 2e-6


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("groups", few([2, 6], 1))
def test_each_group_sees_its_own_channels(form, groups):
    images = normal(3, 6, 5, 6)
    for strides, padding in itertools.product(((1, 1), (2, 1)), ("same", "valid")):
        moment, total = patch_second_moment(
            images, (3, 2), strides, padding, groups=groups, form=form
        )
        size = 6 // groups
        for group in range(groups):
            channels = slice(group * size, (group + 1) * size)
            expected = naive_moment(images, (3, 2), strides, padding, (1, 1), channels)
            np.testing.assert_allclose(moment[group], expected[0], atol=1e-11)
            np.testing.assert_allclose(total[group], expected[1], atol=1e-11)


@pytest.mark.parametrize("form", FORMS)
def test_channels_first_is_the_same(form):
    images = normal(2, 6, 7, 3)
    first = patch_second_moment(
        images.transpose(0, 3, 1, 2), 3, padding="same", data_format="channels_first", form=form
    )
    last = patch_second_moment(images, 3, padding="same", form=form)
    np.testing.assert_array_equal(first[0], last[0])
    np.testing.assert_array_equal(first[1], last[1])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_low_precision_is_summed_in_float32(form, dtype):
    """Also where a sum in half precision would stop growing, or overflow."""
    images = tf.cast(30 + normal(64, 16, 16, 2), dtype)
    moment, total = patch_second_moment(images, 3, padding="same", form=form)
    exact = tf.cast(images, tf.float64).numpy()
    expected = patch_second_moment(exact, 3, padding="same", form="im2col")
    assert moment.dtype == total.dtype == tf.float32
    assert relative_error(moment, expected[0]) < 2e-6
    assert relative_error(total, expected[1]) < 2e-6


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("jit_compile", few([False, True], 1))
def test_batch_size_may_be_unknown_and_forms_compile(form, jit_compile):
    function = tf.function(
        lambda images: patch_second_moment(images, 3, 1, "same", form=form),
        input_signature=[tf.TensorSpec((None, 8, 9, 2), tf.float64)],
        autograph=False,
        jit_compile=jit_compile,
    )
    for batch in (1, 2, 5):
        images = normal(batch, 8, 9, 2)
        moment, total = naive_moment(images, (3, 3), (1, 1), "same", (1, 1))
        result = function(images)
        np.testing.assert_allclose(result[0][0], moment, atol=1e-10)
        np.testing.assert_allclose(result[1][0], total, atol=1e-10)


@pytest.mark.parametrize("form", FORMS)
def test_empty_batch_sums_to_zero(form):
    moment, total = patch_second_moment(np.zeros((0, 8, 9, 2)), 3, padding="same", form=form)
    assert moment.shape == (1, 18, 18)
    assert not np.any(moment)
    assert not np.any(total)


@pytest.mark.parametrize("jit_compile", [False, True])
def test_image_size_may_be_unknown(jit_compile):
    function = tf.function(
        lambda images: patch_second_moment(images, 3, 2, "same"),
        input_signature=[tf.TensorSpec((None, None, None, 2), tf.float64)],
        autograph=False,
        jit_compile=jit_compile,
    )
    for size in ((6, 7), (1, 9)):
        images = normal(3, *size, 2)
        moment, _ = naive_moment(images, (3, 3), (2, 2), "same", (1, 1))
        np.testing.assert_allclose(function(images)[0][0], moment, atol=1e-10)


@pytest.mark.parametrize("jit_compile", [False, True])
@pytest.mark.parametrize("batch", few([5, 1, 4], 1))
@pytest.mark.parametrize("form", FORMS)
def test_slices_of_the_batch_add_up(monkeypatch, form, jit_compile, batch):
    """Slices of two images, with and without one left over."""
    images = normal(batch, 6, 7, 2)
    for module in (moment, im2col):
        monkeypatch.setattr(module, "SLICE_BYTES", 2 * 7 * 8 * 18 * 8)
    if form != "im2col":
        monkeypatch.setattr(moment, "working_set_size", lambda *_: 7 * 8 * 18)
    function = tf.function(
        lambda images: patch_second_moment(images, 3, padding="same", form=form),
        input_signature=[tf.TensorSpec((None, 6, 7, 2), tf.float64)],
        autograph=False,
        jit_compile=jit_compile,
    )
    result = function(images)
    expected = naive_moment(images, (3, 3), (1, 1), "same", (1, 1))
    np.testing.assert_allclose(result[0][0], expected[0], atol=1e-11)
    np.testing.assert_allclose(result[1][0], expected[1], atol=1e-11)
