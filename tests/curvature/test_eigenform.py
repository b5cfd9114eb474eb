"""Blocks by eigenvalues against the matrices that their structures stand for."""

import numpy as np
import pytest
from scipy.linalg import block_diag

from conftest import relative_error
from keras_kfc.curvature.api import STRUCTURES
from keras_kfc.maps.conv import Conv2DMap
from keras_kfc.maps.dense import DenseMap
from keras_kfc.maps.embedding import EmbeddingMap

DENSE, GROUPED, TABLE = DenseMap(4, 3), Conv2DMap((1, 2), 4, 6, groups=2), EmbeddingMap(5, 3)


def positive(rng, *shape):
    root = rng.normal(size=(*shape, shape[-1]))
    return root @ np.swapaxes(root, -1, -2)


def explicit(name, factors):
    """The whole matrix over `(G, n, m)`, from the definition of the structure."""
    if name == "kronecker":
        return block_diag(*(np.kron(*pair) for pair in zip(*factors, strict=True)))
    if name in ("diagonal", "eigenbasis"):
        return np.diag(factors[-1].ravel())
    if name == "full":
        return block_diag(*factors[0])
    if name == "diagonal_input":
        return np.kron(np.diag(factors[0]), factors[1][0])
    counts, hidden, gamma, squares = factors
    scale = np.sqrt(squares.sum() * np.trace(gamma[0]) / (counts.sum() * np.trace(hidden[0])))
    return np.kron(np.diag(counts + squares / scale), gamma[0] + scale * hidden[0])


CASES = [
    (name, linear_map)
    for name, structure in STRUCTURES.items()
    for linear_map in ((DENSE, GROUPED) if structure.for_any_map else (TABLE,))
]


@pytest.mark.parametrize(("name", "linear_map"), CASES)
def test_it_is_the_matrix_of_the_structure(name, linear_map):
    layout = STRUCTURES[name].layout(linear_map, linear_map is not TABLE, None)
    rng = np.random.default_rng(0)
    factors = [
        positive(rng, *shape[:-1])
        if key in layout.symmetric_factors
        else rng.uniform(0.5, 2, shape)
        for key, shape in layout.factor_shapes.items()
    ]
    form = layout.eigenform(factors)
    size = int(np.prod(form.shape))
    matrix = explicit(name, factors)
    basis = np.eye(size).reshape(size, *form.shape)
    found = form.weights(form.values * form.coordinates(basis)).reshape(size, size)
    assert relative_error(found, matrix) < 1e-9
    assert relative_error(form.diagonal().ravel(), np.diag(matrix)) < 1e-9
    np.testing.assert_allclose(form.weights(form.coordinates(basis)), basis, atol=1e-12)
    assert (form.values >= 0).all()
