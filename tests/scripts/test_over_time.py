"""The chains of `benchmarks.over_time`, against explicit Fisher matrices."""

import numpy as np
import pytest
import tensorflow as tf

from benchmarks import over_time
from conftest import relative_error
from keras_kfc.maps.dense import DenseMap

N, M, T = 3, 2, 7


def chain(rng, size, symmetric):
    """`A_0`, and `Ψ` in the coordinates of the weights."""
    root = rng.normal(size=(size, size))
    first = root @ root.T + np.eye(size)
    values, vectors = np.linalg.eigh(first)
    half = vectors * np.sqrt(values) @ vectors.T
    psi = rng.normal(size=(size, size))
    psi = (psi + psi.T) / 2 if symmetric else psi
    psi *= 0.7 / np.linalg.norm(psi, 2)
    return first, half @ psi @ np.linalg.inv(half)


def fisher(a, g, steps, weight):
    """`Σ_d w_d A_d ⊗ G_d` from the definition."""
    total = np.zeros((N * M, N * M))
    for d in range(steps):
        powers = (np.linalg.matrix_power(psi, d) @ first for first, psi in (a, g))
        term = weight(d) * np.kron(*powers)
        total += term if d == 0 else term + term.T
    return total


@pytest.mark.parametrize("model", ["independent", "symmetric", "long"])
def test_inverses_are_those_of_explicit_matrices(model):
    rng = np.random.default_rng(0)
    a, g = (chain(rng, size, model == "symmetric") for size in (N, M))
    if model == "independent":
        a, g = ((first, 0 * psi) for first, psi in (a, g))
    steps = 300 if model == "long" else T
    expected = fisher(a, g, steps, lambda d: 1.0 if model == "long" else T - d)
    scale = 1.0 if model == "long" else T
    factors = {
        "omega": scale * a[0],
        "omega_next": scale * a[1] @ a[0],
        "gamma": g[0],
        "gamma_next": g[1] @ g[0],
        "steps": np.full((1, 1), float(T)),
    }
    parts = over_time.chain_of(
        model, {name: tf.constant(own[None]) for name, own in factors.items()}, (0.0, 0.0)
    )
    weights = rng.normal(size=(1, N, M))
    found = over_time.inverse_times(parts, tf.constant(weights)).numpy()
    wanted = np.linalg.solve(expected, weights.reshape(-1)).reshape(1, N, M)
    assert relative_error(found, wanted) < 1e-9
    if model != "independent":
        # Negative control: without correlations it is another matrix.
        alone = np.linalg.solve(scale * np.kron(a[0], g[0]), weights.reshape(-1))
        assert relative_error(alone, wanted.reshape(-1)) > 0.1


def test_moments_are_those_of_steps_and_the_next_ones():
    rng = np.random.default_rng(0)
    layout = over_time.ChainLayout(DenseMap(N, M), True)
    a, ds = rng.normal(size=(4, T, N)), rng.normal(size=(4, T, M))
    found = layout.from_pass([tf.constant(a)], [tf.constant(ds)], tf.constant(4), [None])
    a = np.pad(a, ((0, 0), (0, 0), (0, 1)), constant_values=1)
    pairs = [(b, t) for b in range(4) for t in range(T - 1)]
    wanted = (
        T * np.mean([np.outer(a[b, t], a[b, t]) for b in range(4) for t in range(T)], axis=0),
        T * np.mean([np.outer(a[b, t + 1], a[b, t]) for b, t in pairs], axis=0),
        np.mean([np.outer(ds[b, t], ds[b, t]) for b in range(4) for t in range(T)], axis=0),
        np.mean([np.outer(ds[b, t + 1], ds[b, t]) for b, t in pairs], axis=0),
    )
    for one, other in zip(found[:4], wanted, strict=True):
        assert relative_error(one[0], other) < 1e-12
    assert np.ravel(found[4]) == [T]
