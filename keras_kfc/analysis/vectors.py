"""Vectors over all weights of a model: one flat array, a column for each vector, or a list."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np


class VectorSpace:
    """The weights of some variables, as one vector.

    Args:
        variables: The variables, whose entries follow each other in their order.

    Attributes:
        shapes: Their shapes.
        size: Number of entries, N.
        dtype: NumPy's dtype of flat vectors: float64 if a variable has it, else float32.
    """

    def __init__(self, variables: Sequence[Any]):
        self.shapes = [tuple(variable.shape) for variable in variables]
        self.sizes = [math.prod(shape) for shape in self.shapes]
        self.size = sum(self.sizes)
        wide = any(str(variable.dtype) == "float64" for variable in variables)
        self.dtype = np.dtype("float64" if wide else "float32")

    def split(self, flat: np.ndarray) -> list[np.ndarray]:
        """A vector `(N,)` as arrays of the shapes of the variables."""
        parts = np.split(flat, np.cumsum(self.sizes)[:-1])
        return [part.reshape(shape) for part, shape in zip(parts, self.shapes, strict=True)]

    def join(self, parts: Sequence[Any]) -> np.ndarray:
        """Arrays of the shapes of the variables as one vector, `(N,)`."""
        return np.concatenate([np.asarray(p, self.dtype).ravel() for p in parts] or [np.zeros(0)])

    def map(self, name: str, vectors: Any, function: Callable[[np.ndarray], np.ndarray]) -> Any:
        """Applies a function of flat vectors to vectors in any of the three forms.

        Args:
            name: What messages call the vectors.
            vectors: `(N,)`, `(N, k)`, or a list of arrays of the variables' shapes.
            function: From `(N,)` to `(N,)`.

        Returns:
            The results, in the same form.

        Raises:
            ValueError: If shapes do not fit.
        """
        if isinstance(vectors, (list, tuple)):
            shapes = [tuple(np.shape(part)) for part in vectors]
            if shapes != self.shapes:
                raise ValueError(
                    f"`{name}` must have an array for each trainable variable, of its shape: "
                    f"{self.shapes}. Received: {shapes}"
                )
            return self.split(function(self.join(vectors)))
        columns = np.asarray(vectors, self.dtype)
        if columns.ndim not in (1, 2) or columns.shape[0] != self.size:
            raise ValueError(
                f"`{name}` must be of the shape ({self.size},) or ({self.size}, k), or a list with "
                f"an array for each trainable variable. Received: shape {columns.shape}"
            )
        if columns.ndim == 1:
            return function(columns)
        if not columns.shape[1]:
            return columns
        return np.stack([function(column) for column in columns.T], axis=1)
