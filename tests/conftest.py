"""Oracles and cases that several test modules share.

The oracles are naive float64 NumPy computations from the definitions in
Grosse & Martens (2016); none of them calls the package.
"""

import gc
import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf


def pytest_collection_finish():
    """Spares the garbage collector what is there for good: it took a quarter of the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 20, 20)


# Scripts for processes of their own, which set up devices.
collect_ignore = [
    "contracts/placement_checks.py",
    "placement/worker_cases.py",
    # Need PyTorch.
    "peers/write_curvlinops.py",
    "peers/write_laplace.py",
]


@pytest.fixture(autouse=True)
def _default_float_type():
    """Every test leaves Keras with its default float type."""
    yield
    keras.config.set_floatx("float32")
    keras.config.set_dtype_policy("float32")


# Tests of what users run: their graphs are optimised as a user's are.
_AS_USERS_RUN_IT = {"training", "golden", "placement", "scripts", "optimizer"}


@pytest.fixture(autouse=True)
def _graphs_as_they_are(request):
    """Elsewhere a graph runs a few times only, and takes longer to optimise than to run."""
    leave = request.node.path.parent.name in _AS_USERS_RUN_IT
    if not leave:
        tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": True})
    yield
    if not leave:
        tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": False})


@pytest.fixture
def eager_functions():
    """Graph functions run eagerly: building one for each of many cases takes longer."""
    tf.config.run_functions_eagerly(True)
    yield
    tf.config.run_functions_eagerly(False)


def output_geometry(size, kernel, stride, padding, dilation):
    """Number of output positions along one axis, and the zero padding before it."""
    extent = dilation * (kernel - 1) + 1
    if padding == "valid":
        return (size - extent) // stride + 1, 0
    outputs = -(-size // stride)
    return outputs, max((outputs - 1) * stride + extent - size, 0) // 2


def naive_patches(image, kernel_size, strides, padding, dilation_rate, channels=slice(None)):
    """Yields the patch of each output position, by explicit loops.

    `image` is one example, (H, W, J); patches are in the order (kh, kw, channel).
    """
    image = image[..., channels]
    height, width, _ = image.shape
    rows, top = output_geometry(height, kernel_size[0], strides[0], padding, dilation_rate[0])
    columns, left = output_geometry(width, kernel_size[1], strides[1], padding, dilation_rate[1])
    for row, column in itertools.product(range(rows), range(columns)):
        patch = []
        for tap_row, tap_column in itertools.product(*map(range, kernel_size)):
            y = row * strides[0] + tap_row * dilation_rate[0] - top
            x = column * strides[1] + tap_column * dilation_rate[1] - left
            inside = 0 <= y < height and 0 <= x < width
            patch.extend(image[y, x] if inside else np.zeros(image.shape[-1]))
        yield np.array(patch, "float64")


def naive_omega(images, kernel_size, strides, padding, dilation_rate, use_bias, **kwargs):
    """Omega from its definition: the mean over examples of Σ_t ā_t ā_tᵀ."""
    total = 0.0
    for image in np.asarray(images, "float64"):
        for patch in naive_patches(image, kernel_size, strides, padding, dilation_rate, **kwargs):
            extended = np.append(patch, 1.0) if use_bias else patch
            total = total + np.outer(extended, extended)
    return total / len(images)


def naive_gamma(derivatives):
    """Gamma from its definition: the mean over examples of (1/|T|) Σ_t Ds_t Ds_tᵀ."""
    derivatives = np.asarray(derivatives, "float64")
    total = 0.0
    for example in derivatives:
        positions = example.reshape(-1, example.shape[-1])
        for derivative in positions:
            total = total + np.outer(derivative, derivative) / len(positions)
    return total / len(derivatives)


def softmax(logits):
    """Softmax over the last axis, in float64."""
    logits = np.asarray(logits, "float64")
    exponentials = np.exp(logits - logits.max(-1, keepdims=True))
    return exponentials / exponentials.sum(-1, keepdims=True)


def explicit_ggn(model, inputs, variables, loss_of_outputs, outputs_of=None):
    """Generalised Gauss-Newton matrix of a loss, by explicit Jacobians and Hessians.

    Args:
        model: Callable from inputs to outputs.
        inputs: A batch.
        variables: Variables; the matrix is over their concatenated entries.
        loss_of_outputs: Function from the whole batch's outputs to the scalar
            loss as Keras computes it.
        outputs_of: Function that maps the model's outputs to what counts as
            outputs (the logits), by default the identity.

    Returns:
        (parameters, parameters), float64.
    """
    with tf.GradientTape(persistent=True) as tape:
        outputs = model(inputs)
        outputs = outputs if outputs_of is None else outputs_of(outputs)
        flat = tf.reshape(outputs, [-1])
    jacobians = tape.jacobian(flat, variables, experimental_use_pfor=False)
    jacobian = np.concatenate(
        [np.asarray(part, "float64").reshape(flat.shape[0], -1) for part in jacobians], axis=1
    )
    point = tf.constant(outputs.numpy())
    with tf.GradientTape(persistent=True) as outer:
        outer.watch(point)
        with tf.GradientTape() as inner:
            inner.watch(point)
            loss = loss_of_outputs(point)
        gradient = inner.gradient(loss, point)
    hessian = outer.jacobian(gradient, point, experimental_use_pfor=False)
    hessian = np.asarray(hessian, "float64").reshape(flat.shape[0], flat.shape[0])
    return jacobian.T @ hessian @ jacobian


def relative_error(actual, expected):
    """Frobenius norm of the difference over that of the expected value."""
    actual, expected = np.asarray(actual, "float64"), np.asarray(expected, "float64")
    return np.linalg.norm(actual - expected) / max(np.linalg.norm(expected), 1e-300)


@pytest.fixture
def float64():
    """New layers are of float64."""
    keras.config.set_floatx("float64")
    yield
    keras.config.set_floatx("float32")
