"""The exact Fisher matrix of a network as a linear operator."""

from collections.abc import Iterable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_kfc.analysis import scipy_tools
from keras_kfc.analysis.batches import Batches, drawn_seed
from keras_kfc.analysis.vectors import VectorSpace
from keras_kfc.losses.output_curvature import OutputCurvature
from keras_kfc.losses.terms import loss_terms
from keras_kfc.passes.jacobian import Jacobian
from keras_kfc.utils.arguments import check_number, check_positive_integer


class FisherOperator:
    """The Fisher matrix of a whole model on given data, `F + λ I`, by products alone.

    `F` is the generalised Gauss-Newton matrix of the Keras loss, its mean over the data:
    `F = Jᵀ H J`, with the Jacobian `J` of the outputs with regard to all trainable variables and
    the Hessian `H` of the loss in the outputs (Martens & Grosse 2015, section 2; Schraudolph 2002
    for the products). Nothing is approximated, whatever the layers are, as long as they can be
    differentiated twice; where the loss has no such matrix, the empirical Fisher matrix takes its
    place, which is logged. The model runs in inference mode, and nothing about it changes.

    A product costs about three forward and backward passes over the data. N is the number of
    weights. Vectors are arrays `(N,)` or `(N, k)`, all variables' entries one after the other,
    or lists of arrays of the variables' shapes; results have the form of what is given.

    Args:
        model: A built model, instrumented or not.
        x: Inputs, in the structure that the model takes, first axis examples.
        y: Targets; needed for losses whose Fisher matrix is not known without.
        loss: The loss, as `keras.Model.compile` takes it. Defaults to the compiled one.
        damping: `λ`, at least 0.
        batch_size: Number of examples to run at a time.
        variables: The variables, or None for all trainable ones.
        jit_compile: Whether XLA compiles the products.

    Attributes:
        shape: `(N, N)`.
        dtype: NumPy's dtype of results.
        variables: The variables.
        iterations: How many iterations the last `solve` took.

    Raises:
        TypeError: If `model` is not a Keras model, or `x` or `y` hold something else than arrays.
        ValueError: If no loss is known, `y` is missing where it is needed, arrays differ in
            length, or an argument is out of range.

    Example:

    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    >>> x = np.random.default_rng(0).normal(size=(8, 4))
    >>> fisher = keras_kfc.FisherOperator(model, x, loss="mse", damping=0.1)
    >>> fisher.shape
    (10, 10)
    >>> v = np.ones(10, "float32")
    >>> bool(np.allclose(fisher @ v, fisher.to_dense() @ v, atol=1e-5))
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
        batch_size: int = 256,
        variables: Iterable[Any] | None = None,
        jit_compile: bool = False,
    ):
        self._batches = Batches(model, x, y, loss, batch_size)
        self.damping = check_number("damping", damping, 0)
        self.variables = list(model.trainable_variables if variables is None else variables)
        if not self.variables:
            raise ValueError(
                "Argument `model` must have trainable variables. Received: a model with none"
            )
        self._space = VectorSpace(self.variables)
        self.shape = (self._space.size, self._space.size)
        self.dtype = self._space.dtype
        self.iterations = 0
        self._jit_compile = jit_compile
        self._noted = False
        self._product = self._function(self._times)
        self._tangents = self._function(self._roots_of)
        self._random = self._function(self._random_gradient)
        self._column = self._function(self._column_gradient)

    def with_damping(self, damping: float) -> "FisherOperator":
        """The same matrix with another `λ`; shares what was compiled."""
        other = object.__new__(FisherOperator)
        vars(other).update(vars(self))
        other.damping = check_number("damping", damping, 0)
        return other

    def __matmul__(self, vectors: Any) -> Any:
        """`(F + λ I) v`."""
        return self._space.map("vectors", vectors, self._times_flat)

    def quadratic_form(self, vectors: Any) -> Any:
        """`Vᵀ (F + λ I) V`, which takes half the work of a product.

        Args:
            vectors: V.

        Returns:
            A number for one vector, `(k, k)` for `(N, k)`.
        """
        columns: list[np.ndarray] = []

        def note(vector: np.ndarray) -> np.ndarray:
            columns.append(vector)
            return vector

        single = isinstance(vectors, (list, tuple)) or np.ndim(vectors) == 1
        self._space.map("vectors", vectors, note)
        total = np.zeros((len(columns), len(columns)))
        for _, size, inputs, targets in self._batches:
            roots = [
                np.concatenate(
                    [
                        part.numpy().ravel()
                        for part in self._tangents(inputs, targets, self._given(v))
                    ]
                ).astype("float64")
                for v in columns
            ]
            total += (
                size / self._batches.examples * np.array([[a @ b for a in roots] for b in roots])
            )
        wide = [v.astype("float64") for v in columns]
        total += self.damping * np.array([[a @ b for a in wide] for b in wide])
        return float(total[0, 0]) if single else total

    def solve(
        self,
        right: Any,
        *,
        preconditioner: Any = None,
        tolerance: float = 1e-5,
        max_iterations: int = 1000,
    ) -> Any:
        """`(F + λ I)⁻¹ b` by conjugate gradients (SciPy's).

        Args:
            right: b.
            preconditioner: Something with a `solve`, such as a
                `keras_kfc.KroneckerFisherOperator`, which takes the place of the inverse, or None.
            tolerance: Norm of the residual, over that of b. In float32 less than `1e-6` may not be
                reached.
            max_iterations: Iterations after which to give up.

        Raises:
            RuntimeError: If the tolerance is not reached.
        """
        tolerance = check_number("tolerance", tolerance, 0, exclude_low=True)
        iterations = check_positive_integer("max_iterations", max_iterations)
        own = self.to_scipy()
        inverse = None
        if preconditioner is not None:
            inverse = scipy_tools.linear_operator(self.shape[0], self.dtype, preconditioner.solve)
        self.iterations = 0

        def solved(vector: np.ndarray) -> np.ndarray:
            found, steps = scipy_tools.solve(own, vector, inverse, tolerance, iterations)
            self.iterations += steps
            return found

        return self._space.map("right", right, solved)

    def diagonal(self, samples: int | None = None, seed: int | None = None) -> np.ndarray:
        """The diagonal, `(N,)`.

        Args:
            samples: Backward passes for each batch, whose outputs start from random signs, so that
                the mean of the squared gradients is the diagonal in expectation (Bekas, Kokiopoulou
                & Saad 2007). None for the exact diagonal, which takes as many passes as there are
                examples times outputs, or weights, whichever is less.
            seed: Seed of the signs, or None for a random one.
        """
        if samples is not None:
            samples = check_positive_integer("samples", samples)
        first_seed = drawn_seed(seed)
        total = np.zeros(self.shape[0])
        for start, size, inputs, targets in self._batches:
            share = size / self._batches.examples
            if samples is None:
                total += share * self._exact_diagonal(inputs, targets)
                continue
            for number in range(samples):
                own_seed = tf.constant([first_seed, (start << 16) + number], tf.int64)
                gradient = self._space.join(self._random(inputs, targets, own_seed))
                total += share / samples * np.square(gradient.astype("float64"))
        return (total + self.damping).astype(self.dtype)

    def trace(self, samples: int | None = None, seed: int | None = None) -> float:
        """The trace.

        Args:
            samples: As of `diagonal`.
            seed: Likewise.
        """
        return float(self.diagonal(samples, seed).sum(dtype="float64"))

    def eigenvalues(self, count: int, *, smallest: bool = False, seed: int = 0) -> np.ndarray:
        """Some eigenvalues, in descending order, by Lanczos iterations (SciPy's).

        Args:
            count: How many, less than N.
            smallest: Whether those at the lower end of the spectrum are wanted.
            seed: Seed of the vector to start from.
        """
        count = check_positive_integer("count", count)
        if count >= self.shape[0]:
            raise ValueError(
                f"Argument `count` must be less than the number of weights, {self.shape[0]}. "
                f"Received: count={count}. `np.linalg.eigvalsh(operator.to_dense())` has them all."
            )
        return scipy_tools.largest_eigenvalues(self.to_scipy(), count, smallest, seed)

    def to_scipy(self) -> Any:
        """The same as a `scipy.sparse.linalg.LinearOperator`."""
        return scipy_tools.linear_operator(self.shape[0], self.dtype, self._times_flat)

    def to_dense(self) -> np.ndarray:
        """All of it, `(N, N)`: N products, for small models."""
        return np.asarray(self @ np.eye(self.shape[0], dtype=self.dtype))

    def _times_flat(self, vector: np.ndarray) -> np.ndarray:
        total = self.damping * vector.astype("float64")
        given = self._given(vector)
        for _, size, inputs, targets in self._batches:
            product = self._space.join(self._product(inputs, targets, given))
            total += size / self._batches.examples * product.astype("float64")
        return total.astype(self.dtype)

    def _given(self, vector: np.ndarray) -> list[tf.Tensor]:
        parts = zip(self._space.split(vector), self.variables, strict=True)
        return [tf.constant(part, str(variable.dtype)) for part, variable in parts]

    def _function(self, call: Any) -> Any:
        return self._batches.function(call, self._jit_compile)

    def _linearised(self, inputs: Any, targets: Any) -> tuple[Jacobian, OutputCurvature]:
        """The model's Jacobian and the loss's Hessian on a batch."""
        with tf.GradientTape(persistent=True, watch_accessed_variables=False) as tape:
            for variable in self.variables:
                tape.watch(variable.value)
            outputs = self._batches.call(inputs)
        curvature = OutputCurvature(loss_terms(self._batches.compiled, targets, outputs))
        self._noted = self._noted or curvature.log_notes()
        return Jacobian(tape, curvature.sources, self.variables), curvature

    def _times(self, inputs: Any, targets: Any, vectors: list[tf.Tensor]) -> list[tf.Tensor]:
        jacobian, curvature = self._linearised(inputs, targets)
        return jacobian.transposed_times(curvature.times(jacobian.times(vectors)))

    def _roots_of(self, inputs: Any, targets: Any, vectors: list[tf.Tensor]) -> list[tf.Tensor]:
        jacobian, curvature = self._linearised(inputs, targets)
        return curvature.transposed_root_times(jacobian.times(vectors))

    def _random_gradient(self, inputs: Any, targets: Any, seed: tf.Tensor) -> list[tf.Tensor]:
        jacobian, curvature = self._linearised(inputs, targets)
        return jacobian.transposed_times(curvature.random_root(seed))

    def _column_gradient(self, inputs: Any, targets: Any, number: tf.Tensor) -> list[tf.Tensor]:
        """How many columns `S` has, a scalar, and `Jᵀ S` for one of them, by variable."""
        jacobian, curvature = self._linearised(inputs, targets)
        return [curvature.size(), *jacobian.transposed_times(curvature.column(number))]

    def _exact_diagonal(self, inputs: Any, targets: Any) -> np.ndarray:
        total, number, count = np.zeros(self.shape[0]), 0, 1
        while number < count:
            columns, *gradients = self._column(inputs, targets, tf.constant(number))
            count = int(columns)
            if count > self.shape[0]:
                return self._diagonal_by_products(inputs, targets)
            total += np.square(self._space.join(gradients).astype("float64"))
            number += 1
        return total

    def _diagonal_by_products(self, inputs: Any, targets: Any) -> np.ndarray:
        diagonal = np.zeros(self.shape[0])
        for number in range(self.shape[0]):
            unit = np.zeros(self.shape[0], self.dtype)
            unit[number] = 1
            roots = self._tangents(inputs, targets, self._given(unit))
            diagonal[number] = sum(float(tf.reduce_sum(tf.square(part))) for part in roots)
        return diagonal
