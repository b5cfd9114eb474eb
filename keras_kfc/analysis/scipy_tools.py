"""What of SciPy serves linear operators; it is needed for these alone."""

from collections.abc import Callable
from typing import Any

import numpy as np


def _scipy() -> Any:
    try:
        import scipy.sparse.linalg
    except ImportError as error:
        raise ImportError(
            "Solving, eigenvalues and `to_scipy` need SciPy: `pip install scipy`."
        ) from error
    return scipy.sparse.linalg


def linear_operator(
    size: int, dtype: np.dtype[Any], product: Callable[[np.ndarray], np.ndarray]
) -> Any:
    """A symmetric `scipy.sparse.linalg.LinearOperator` of a function from `(N,)` to `(N,)`."""

    def times(vector: np.ndarray) -> np.ndarray:
        return product(np.asarray(vector, dtype).reshape(-1))

    return _scipy().LinearOperator((size, size), matvec=times, rmatvec=times, dtype=dtype)


def solve(
    operator: Any, right: np.ndarray, preconditioner: Any, tolerance: float, iterations: int
) -> tuple[np.ndarray, int]:
    """Conjugate gradients; returns the solution, and how many iterations it took.

    Raises:
        RuntimeError: If the tolerance is not reached.
    """
    steps: list[int] = []
    found, status = _scipy().cg(
        operator,
        right,
        rtol=tolerance,
        maxiter=iterations,
        M=preconditioner,
        callback=lambda _: steps.append(1),
    )
    if status:
        residual = np.linalg.norm(operator @ found - right) / float(np.linalg.norm(right))
        raise RuntimeError(
            f"Conjugate gradients did not reach tolerance={tolerance} in {len(steps)} iterations; "
            f"the relative residual is {residual:.2g}. More damping, a preconditioner, float64 "
            "variables, or a larger tolerance or max_iterations help."
        )
    return found, len(steps)


def largest_eigenvalues(operator: Any, count: int, smallest: bool, seed: int) -> np.ndarray:
    """Lanczos: some eigenvalues of one end of the spectrum, in descending order."""
    start = np.random.default_rng(seed).normal(size=operator.shape[0]).astype(operator.dtype)
    which = "SA" if smallest else "LA"
    values = _scipy().eigsh(operator, count, which=which, v0=start, return_eigenvectors=False)
    return np.sort(values)[::-1]
