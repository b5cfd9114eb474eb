"""Posteriors against those of laplace-torch, a package for PyTorch that nobody here has written.

`write_laplace.py` has written what it makes of two small networks, trained there.
"""

import pathlib

import keras
import numpy as np
import pytest
from helpers import few

import keras_kfc

STORED = np.load(pathlib.Path(__file__).with_name("laplace.npz"))
PRECISION, NOISE = 0.7, 0.3
STRUCTURES = {"kron": "kronecker", "diag": "diagonal", "full": "full"}
LAYERS = {"all": "all", "last_layer": "last"}
# A block of all weights of the network together there is none of here, only whole ones of layers.
CASES = [
    (likelihood, subset, structure)
    for likelihood in ("classification", "regression")
    for subset in LAYERS
    for structure in STRUCTURES
    if (subset, structure) != ("all", "full")
]


def posterior_of(likelihood: str, subset: str, structure: str) -> keras_kfc.LaplacePosterior:
    """Ours for the stored weights and data."""
    kernels = [STORED[f"{likelihood}/{number}.weight"].T for number in (0, 2)]
    inputs = keras.Input((4,))
    hidden = keras.layers.Dense(5, "tanh", use_bias=False)(inputs)
    outputs = keras.layers.Dense(kernels[1].shape[1], use_bias=False)(hidden)
    model = keras.Model(inputs, outputs)
    model.set_weights(kernels)
    loss = (
        keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        if likelihood == "classification"
        else keras.losses.MeanSquaredError()
    )
    return keras_kfc.laplace(
        model,
        STORED[f"{likelihood}/x"],
        STORED[f"{likelihood}/y"],
        loss=loss,
        structure=STRUCTURES[structure],
        layers=LAYERS[subset],
        prior_precision=PRECISION,
        noise_variance=NOISE,
    )


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(("likelihood", "subset", "structure"), few(CASES, 4))
def test_posterior_is_that_of_laplace_torch(likelihood, subset, structure):
    posterior = posterior_of(likelihood, subset, structure)
    theirs = f"{likelihood}/{subset}/{structure}"
    new = STORED[f"{likelihood}/new"]
    mean, covariance = posterior.outputs(new)
    np.testing.assert_allclose(mean, STORED[f"{theirs}/mean"], rtol=1e-9)
    np.testing.assert_allclose(covariance, STORED[f"{theirs}/covariance"], rtol=1e-7, atol=1e-12)
    # A control: that of another structure is another one.
    other = "diag" if structure != "diag" else "kron"
    others = STORED[f"{likelihood}/{subset}/{other}/covariance"]
    assert np.abs(covariance - others).max() > 0.02 * np.abs(others).max()
    if likelihood == "classification":
        np.testing.assert_allclose(posterior.predict(new), STORED[f"{theirs}/probit"], rtol=1e-7)
    evidence = posterior.log_marginal_likelihood()
    np.testing.assert_allclose(evidence, STORED[f"{theirs}/evidence"], rtol=1e-9)
