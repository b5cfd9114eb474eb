"""A curvature block by eigenvalues and eigenvectors, for analysis.

Whatever a structure keeps, its block is a symmetric matrix over the weights of a layer, which is
diagonal in some orthonormal basis. In that basis damping is a number that is added, so that
inverses, determinants and draws for any damping cost no more than a product.
"""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Eigenform:
    """`Q diag(values) Qᵀ` over a layer's weights, with `Q` a product of two matrices, or one.

    The coordinates of weights D in the basis are `leftᵀ D right`, of each group.

    Args:
        shape: Shape of the weights, `(G, n, m)`, which are reshaped to that of `values`.
        values: Eigenvalues, `(G, a, b)`, float64, not negative.
        left: Orthonormal columns, `(G, a, a)`, or None for those of the identity.
        right: Likewise, `(G, b, b)`.
    """

    shape: tuple[int, int, int]
    values: np.ndarray
    left: np.ndarray | None = None
    right: np.ndarray | None = None

    def coordinates(self, weights: np.ndarray) -> np.ndarray:
        """`Qᵀ w`, `(..., G, n, m)` to `(..., G, a, b)`."""
        weights = weights.reshape((*weights.shape[:-3], *self.values.shape))
        if self.left is not None:
            weights = np.swapaxes(self.left, 1, 2) @ weights
        return weights if self.right is None else weights @ self.right

    def weights(self, coordinates: np.ndarray) -> np.ndarray:
        """`Q c`, `(..., G, a, b)` to `(..., G, n, m)`."""
        if self.left is not None:
            coordinates = self.left @ coordinates
        if self.right is not None:
            coordinates = coordinates @ np.swapaxes(self.right, 1, 2)
        return coordinates.reshape((*coordinates.shape[:-3], *self.shape))

    def diagonal(self) -> np.ndarray:
        """The diagonal of the matrix, `(G, n, m)`."""
        values = self.values
        if self.left is not None:
            values = np.square(self.left) @ values
        if self.right is not None:
            values = values @ np.swapaxes(np.square(self.right), 1, 2)
        return values.reshape(self.shape)


def eigenvectors_of(matrices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues, no less than zero, and eigenvectors of a stack of symmetric matrices.

    Args:
        matrices: `(G, n, n)`, positive semi-definite up to rounding.
    """
    values, vectors = np.linalg.eigh(matrices)
    return np.maximum(values, 0), vectors
