"""The approximate Fisher matrix of a network, as KFC has it, as a linear operator."""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np

from keras_kfc.analysis import scipy_tools
from keras_kfc.analysis.batches import Batches, drawn_seed
from keras_kfc.analysis.blocks import AnalysedBlock, analysed_blocks
from keras_kfc.analysis.operator import FisherOperator
from keras_kfc.analysis.vectors import VectorSpace
from keras_kfc.curvature.api import STRUCTURES
from keras_kfc.layers.instrument import temporarily_instrumented
from keras_kfc.losses.derivatives import FISHERS
from keras_kfc.utils.arguments import check_choice, check_number

# Backward passes for the diagonal of variables without a block.
_SAMPLES = 32

Change = Callable[[np.ndarray], np.ndarray]


class KroneckerFisherOperator:
    """A block-diagonal approximation of the Fisher matrix on given data, `F̂ + λ I`.

    The blocks are those that KFC trains with: for most layers `Ω ⊗ Γ` (Grosse & Martens 2016,
    section 3). They are kept by their eigenvalues and eigenvectors, so that `λ` is added to
    the product, exactly, not to its factors, and inverses, determinants and draws cost no more
    than a product. Variables without a block have an estimate of their diagonal. Vectors are
    as of `keras_kfc.FisherOperator`.

    Args:
        model: A built model, instrumented or not; nothing about it changes.
        x: Inputs, in the structure that the model takes, first axis examples.
        y: Targets; needed for `fisher="empirical"`, and for losses whose Fisher matrix is not
            known without.
        loss: The loss, as `keras.Model.compile` takes it. Defaults to the compiled one.
        damping: `λ`, at least 0.
        structure: `"kronecker"`, `"eigenbasis"` (a second pass over the data), `"diagonal"` or
            `"full"`, as of `keras_kfc.KFC`.
        fisher: `"exact"`, `"sampled"`, `"curvature_propagation"` or `"empirical"`.
        batch_size: Number of examples to run at a time.
        seed: Seed of random numbers, or None for a random one.

    Attributes:
        shape: `(N, N)`.
        dtype: NumPy's dtype of results.
        variables: The model's trainable variables.

    Raises:
        TypeError: If `model` is not a Keras model, or `x` or `y` hold something else than arrays.
        ValueError: If no loss is known, `y` is missing where it is needed, arrays differ in
            length, or an argument is out of range.

    Example:

    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    >>> x = np.random.default_rng(0).normal(size=(8, 4))
    >>> blocks = keras_kfc.KroneckerFisherOperator(model, x, loss="mse", damping=0.1)
    >>> exact = keras_kfc.FisherOperator(model, x, loss="mse", damping=0.1)
    >>> b = np.arange(10, dtype="float32")
    >>> solution = exact.solve(b, preconditioner=blocks)
    >>> exact.iterations <= 2  # the block of a single linear layer is exact
    True
    """

    def __init__(
        self,
        model: keras.Model,
        x: Any,
        y: Any = None,
        *,
        loss: Any = None,
        damping: float = 0.0,
        structure: str = "kronecker",
        fisher: str = "exact",
        batch_size: int = 256,
        seed: int | None = None,
    ):
        self.damping = check_number("damping", damping, 0)
        choices = tuple(name for name, kind in STRUCTURES.items() if kind.for_any_map)
        check_choice("structure", structure, choices)
        check_choice("fisher", fisher, FISHERS)
        seed = drawn_seed(seed)
        with temporarily_instrumented(model):
            batches = Batches(model, x, y, loss, batch_size)
            self.variables = list(model.trainable_variables)
            self._blocks = analysed_blocks(batches, self.variables, structure, fisher, seed)
        self._space = VectorSpace(self.variables)
        self.shape = (self._space.size, self._space.size)
        self.dtype = self._space.dtype
        covered = {i for block in self._blocks for i in block.indices.every}
        rest = [i for i in range(len(self.variables)) if i not in covered]
        self._rest: dict[int, np.ndarray] = {}
        if rest:
            own = [self.variables[i] for i in rest]
            operator = FisherOperator(model, x, y, loss=loss, batch_size=batch_size, variables=own)
            diagonals = VectorSpace(own).split(operator.diagonal(_SAMPLES, seed).astype("float64"))
            self._rest = dict(zip(rest, diagonals, strict=True))

    @property
    def blocks(self) -> list[AnalysedBlock]:
        """The blocks, with their `path` and eigenvalues `values`."""
        return list(self._blocks)

    def with_damping(self, damping: float) -> "KroneckerFisherOperator":
        """The same matrix with another `λ`, at no cost."""
        other = object.__new__(KroneckerFisherOperator)
        vars(other).update(vars(self))
        other.damping = check_number("damping", damping, 0)
        return other

    def __matmul__(self, vectors: Any) -> Any:
        """`(F̂ + λ I) v`."""
        return self._mapped("vectors", vectors, lambda values: values)

    def solve(self, right: Any) -> Any:
        """`(F̂ + λ I)⁻¹ b`.

        Raises:
            ValueError: If the matrix is singular; `damping` cures that.
        """
        self._check_regular()
        return self._mapped("right", right, lambda values: 1 / values)

    def sample(self, count: int | None = None, seed: int | None = None) -> np.ndarray:
        """Draws of a normal distribution with mean zero and covariance `(F̂ + λ I)⁻¹`.

        Args:
            count: How many, k, for `(N, k)`; None for a single one, `(N,)`.
            seed: Seed of the draws, or None for a random one.
        """
        self._check_regular()
        rng = np.random.default_rng(drawn_seed(seed))
        draws = []
        for _ in range(1 if count is None else count):
            parts: dict[int, np.ndarray] = {}
            for block in self._blocks:
                z = rng.normal(size=block.values.shape)
                parts.update(block.weights(z / np.sqrt(block.values + self.damping)))
            for index, values in self._rest.items():
                parts[index] = rng.normal(size=values.shape) / np.sqrt(values + self.damping)
            draws.append(self._joined(parts))
        return draws[0] if count is None else np.stack(draws, axis=1)

    def logdet(self) -> float:
        """The logarithm of the determinant.

        Raises:
            ValueError: If the matrix is singular.
        """
        self._check_regular()
        return float(np.log(self.eigenvalues()).sum())

    def eigenvalues(self) -> np.ndarray:
        """All eigenvalues, in descending order, `(N,)`, float64."""
        parts = [*(block.values for block in self._blocks), *self._rest.values()]
        return np.sort(np.concatenate([part.ravel() for part in parts]) + self.damping)[::-1]

    def trace(self) -> float:
        """The trace."""
        return float(self.eigenvalues().sum())

    def diagonal(self) -> np.ndarray:
        """The diagonal, `(N,)`."""
        parts = dict(self._rest)
        for block in self._blocks:
            parts.update(block.diagonal())
        return self._joined(parts) + self.dtype.type(self.damping)

    def quadratic_form(self, vectors: Any) -> Any:
        """`Vᵀ (F̂ + λ I) V`: a number for one vector, `(k, k)` for `(N, k)`."""
        products = self @ vectors
        if isinstance(vectors, (list, tuple)):
            vectors, products = self._space.join(vectors), self._space.join(products)
        form = np.asarray(vectors, "float64").T @ np.asarray(products, "float64")
        return float(form) if form.ndim == 0 else form

    def to_scipy(self) -> Any:
        """The same as a `scipy.sparse.linalg.LinearOperator`."""
        return scipy_tools.linear_operator(self.shape[0], self.dtype, lambda v: self @ v)

    def to_dense(self) -> np.ndarray:
        """All of it, `(N, N)`, for small models."""
        return np.asarray(self @ np.eye(self.shape[0], dtype=self.dtype))

    def _mapped(self, name: str, vectors: Any, change: Change) -> Any:
        """Multiplies vectors with a function of the matrix."""

        def times(vector: np.ndarray) -> np.ndarray:
            given = self._space.split(vector.astype("float64"))
            parts = {
                index: change(values + self.damping) * given[index]
                for index, values in self._rest.items()
            }
            for block in self._blocks:
                factors = change(block.values + self.damping)
                parts.update(block.weights(factors * block.coordinates(given)))
            return self._joined(parts)

        return self._space.map(name, vectors, times)

    def _joined(self, parts: dict[int, np.ndarray]) -> np.ndarray:
        return self._space.join([parts[index] for index in range(len(self.variables))])

    def _check_regular(self) -> None:
        smallest = self.eigenvalues()[-1]
        if smallest <= 0:
            raise ValueError(
                "Argument `damping` must be positive for a matrix with eigenvalues of zero. "
                f"Received: damping={self.damping}"
            )
