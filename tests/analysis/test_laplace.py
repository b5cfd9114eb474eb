"""Posteriors against explicit ones: Jacobians by differentiation, matrices by NumPy, in float64.

The formulas are those of Bayesian linear regression, and of the model linearised in its weights.
"""

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import few

import keras_kfc
from conftest import relative_error, softmax

LOSSES = {
    "mse": ("mse", None),
    "classes": ("sparse_categorical_crossentropy", "softmax"),
    "logits": (keras.losses.SparseCategoricalCrossentropy(from_logits=True), None),
    "events": ("binary_crossentropy", "sigmoid"),
}
EXAMPLES, OUTPUTS = 30, 3


@pytest.fixture(autouse=True)
def _float64():
    keras.config.set_floatx("float64")


def data(kind):
    rng = np.random.default_rng(1)
    x = rng.normal(size=(EXAMPLES, 4))
    scores = x @ rng.normal(size=(4, OUTPUTS)) + 0.5 * rng.normal(size=(EXAMPLES, OUTPUTS))
    y = {"mse": scores, "events": (scores > 0).astype(float)}.get(kind, scores.argmax(-1))
    return x, y


def net(kind, hidden=5):
    """With its latent outputs (logits, where there are classes) as a model of their own."""
    keras.utils.set_random_seed(2)
    inputs = keras.Input((4,))
    outputs = inputs
    if hidden:
        outputs = keras.layers.Dense(hidden, activation="tanh", name="hidden")(outputs)
    latent = keras.layers.Dense(OUTPUTS, name="last")(outputs)
    loss, activation = LOSSES[kind]
    outputs = latent if activation is None else keras.layers.Activation(activation)(latent)
    model = keras.Model(inputs, outputs)
    model.compile(keras.optimizers.Adam(0.05), loss)
    return model, keras.Model(inputs, latent)


def explicit_jacobians(latent, x):
    """Of each example's latent outputs, `(B, K, N)`."""
    variables = [v.value for v in latent.trainable_variables]
    with tf.GradientTape(persistent=True) as tape:
        outputs = latent(tf.constant(x))
    parts = tape.jacobian(outputs, variables, experimental_use_pfor=False)
    return np.concatenate([p.numpy().reshape(len(x), OUTPUTS, -1) for p in parts], axis=2)


def output_hessians(kind, outputs):
    """Of the negative logarithm of the likelihood of each example (of variance 1), `(B, K, K)`."""
    if kind == "mse":
        return np.tile(np.eye(OUTPUTS), (len(outputs), 1, 1))
    if kind == "events":
        p = 1 / (1 + np.exp(-outputs))
        return np.stack([np.diag(row * (1 - row)) for row in p])
    p = softmax(outputs)
    return np.stack([np.diag(row) - np.outer(row, row) for row in p])


def explicit_precision(kind, latent, x, prior, noise=1.0):
    jacobians = explicit_jacobians(latent, x)
    hessians = output_hessians(kind, latent.predict(x, verbose=0)) / noise
    ggn = np.einsum("bki,bkl,blj->ij", jacobians, hessians, jacobians)
    return ggn + prior * np.eye(len(ggn))


@pytest.mark.nightly
@pytest.mark.parametrize("kind", few(list(LOSSES), 1))
def test_a_full_posterior_of_the_last_layer_is_the_explicit_one(kind):
    x, y = data(kind)
    model, latent = net(kind, hidden=0)
    model.fit(x, y, epochs=5, verbose=0)
    posterior = keras_kfc.laplace(
        model, x, y, structure="full", layers="last", prior_precision=0.7, noise_variance=1.0
    )
    covariance = np.linalg.inv(explicit_precision(kind, latent, x, 0.7))
    new = np.random.default_rng(5).normal(size=(6, 4))
    jacobians = explicit_jacobians(latent, new)
    expected = jacobians @ covariance @ jacobians.transpose(0, 2, 1)
    mean, found = posterior.outputs(new)
    assert relative_error(found, expected) < 1e-8
    assert relative_error(mean, latent.predict(new, verbose=0)) < 1e-10
    variance = np.diagonal(expected, axis1=1, axis2=2)
    noise = 1.0 if kind == "mse" else 0.0
    assert relative_error(posterior.predictive_variance(new), variance + noise) < 1e-8
    other = posterior.outputs(new)[1] if kind == "mse" else None
    posterior.prior_precision = 70.0
    assert relative_error(posterior.outputs(new)[1], expected) > 0.1  # negative control
    assert other is None or relative_error(other, expected) < 1e-8


@pytest.mark.parametrize("structure", ["kronecker", "diagonal", "full"])
@pytest.mark.slow
def test_a_structure_keeps_the_blocks_that_it_says(structure):
    """Of two layers; the explicit precision is cut to what the structure keeps."""
    x, y = data("logits")
    model, latent = net("logits")
    posterior = keras_kfc.laplace(model, x, y, structure=structure, prior_precision=0.5)
    explicit = explicit_precision("logits", latent, x, 0.0)
    sizes = [v.shape.num_elements() for v in (w.value for w in model.trainable_variables)]
    ends = np.cumsum([sizes[0] + sizes[1], sizes[2] + sizes[3]])
    blocks = np.zeros_like(explicit)
    for start, stop in zip((0, ends[0]), ends, strict=True):
        blocks[start:stop, start:stop] = explicit[start:stop, start:stop]
    if structure == "kronecker":
        factors = keras_kfc.kronecker_factors(model, x, fisher="exact")
        for (start, stop), part in zip(
            ((0, ends[0]), (ends[0], ends[1])), factors.values(), strict=True
        ):
            blocks[start:stop, start:stop] = EXAMPLES * np.kron(part.omega, part.gamma)
    elif structure == "diagonal":
        blocks = np.diag(np.diag(blocks))
    covariance = np.linalg.inv(blocks + 0.5 * np.eye(len(blocks)))
    jacobians = explicit_jacobians(latent, x[:4])
    expected = jacobians @ covariance @ jacobians.transpose(0, 2, 1)
    # Factors are handed out in float32.
    assert relative_error(posterior.outputs(x[:4])[1], expected) < 1e-6
    draws = np.stack([np.concatenate([w.ravel() for w in d]) for d in posterior.sample(800, 0)])
    weights = np.concatenate([v.numpy().ravel() for v in model.trainable_variables])
    assert relative_error(draws.mean(0), weights) < 0.2
    spread = np.sqrt(np.diag(covariance))
    np.testing.assert_allclose(draws.std(0), spread, rtol=0.1)


def test_the_evidence_is_that_of_bayesian_linear_regression():
    """Exact there: targets are normal with covariance `X X^T / δ + σ²`."""
    x, y = data("mse")
    y = y[:, :1]
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1, use_bias=False)])
    model.compile("adam", "mse")
    prior, noise = 0.8, 0.3
    precision = x.T @ x / noise + prior * np.eye(4)
    model.set_weights([np.linalg.solve(precision, x.T @ y / noise)])
    posterior = keras_kfc.laplace(model, x, y, prior_precision=prior, noise_variance=noise)

    def evidence(prior, noise):
        covariance = x @ x.T / prior + noise * np.eye(len(x))
        logdet = np.linalg.slogdet(2 * np.pi * covariance)[1]
        return float(-0.5 * (logdet + (y.T @ np.linalg.solve(covariance, y))[0, 0]))

    assert posterior.log_marginal_likelihood() == pytest.approx(evidence(prior, noise), rel=1e-9)
    assert posterior.log_marginal_likelihood(2.0) < evidence(2.0, noise)  # not the mode of that
    posterior.optimize()
    best = posterior.log_marginal_likelihood()
    for factor in (0.8, 1.25):
        assert posterior.log_marginal_likelihood(posterior.prior_precision * factor) < best
        noise = posterior.noise_variance * factor
        assert posterior.log_marginal_likelihood(noise_variance=noise) < best


@pytest.mark.slow
def test_predictions_are_means_over_the_posterior():
    x, y = data("classes")
    model, _ = net("classes")
    posterior = keras_kfc.laplace(model, x, y, prior_precision=0.5)
    mean, covariance = posterior.outputs(x)
    rng = np.random.default_rng(3)
    expected = np.stack(
        [
            softmax(rng.multivariate_normal(*of_example, size=3000)).mean(0)
            for of_example in zip(mean, covariance, strict=True)
        ]
    )
    found = posterior.predict(x, "monte_carlo", samples=20_000, seed=0)
    np.testing.assert_allclose(found, expected, atol=0.02)
    point = model.predict(x, verbose=0)
    assert np.abs(point - expected).max() > 0.05  # negative control
    probit = posterior.predict(x)
    np.testing.assert_allclose(probit.sum(-1), 1)
    assert probit.max(-1).mean() < point.max(-1).mean()
    variance = np.diagonal(covariance, axis1=1, axis2=2)
    np.testing.assert_allclose(probit, softmax(mean / np.sqrt(1 + np.pi * variance / 8)))


@pytest.mark.nightly
def test_layers_with_masks_positions_and_several_uses_count_whole():
    """The derivatives of single examples are those of differentiation, for any layer kind."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((6, 5, 2))
    shared = keras.layers.Conv2D(2, 3, padding="same", activation="tanh")
    outputs = keras.layers.DepthwiseConv2D(3)(shared(shared(inputs)))
    outputs = keras.layers.GlobalAveragePooling2D()(keras.layers.BatchNormalization()(outputs))
    model = keras.Model(inputs, keras.layers.Dense(OUTPUTS)(outputs))
    model.compile("adam", "mse")
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(7, 6, 5, 2)), rng.normal(size=(7, OUTPUTS))
    posterior = keras_kfc.laplace(
        model, x, y, structure="diagonal", prior_precision=1e9, noise_variance=1.0, batch_size=3
    )
    # Far beyond the data: the covariance is J Jᵀ over the prior precision.
    jacobians = explicit_jacobians(model, x)
    expected = jacobians @ jacobians.transpose(0, 2, 1) / 1e9
    assert relative_error(posterior.outputs(x)[1], expected) < 1e-5


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"structure": "tied"}, ValueError, "`structure`"),
        ({"layers": "first"}, ValueError, "`layers`"),
        ({"loss": "mae"}, ValueError, "known for the losses .*mae"),
        ({"y": None}, ValueError, "`y` is needed"),
        ({"prior_precision": 0.0}, ValueError, "`prior_precision`"),
        ({"noise_variance": -1.0}, ValueError, "`noise_variance`"),
        ({"model": None}, TypeError, "keras.Model"),
    ],
)
def test_bad_arguments_are_refused_by_name(change, error, message):
    x, y = data("mse")
    arguments = {"model": net("mse")[0], "x": x, "y": y, **change}
    with pytest.raises(error, match=message):
        keras_kfc.laplace(**arguments)


def test_outputs_at_positions_are_refused():
    model = keras.Sequential([keras.Input((4, 2)), keras.layers.Dense(3)])
    with pytest.raises(ValueError, match=r"\(examples, outputs\)"):
        keras_kfc.laplace(model, np.ones((2, 4, 2)), np.ones((2, 4, 3)), loss="mse")
