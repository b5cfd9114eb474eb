"""The two inverses of Martens & Grosse (2015) for a chain of dense layers, in NumPy.

Written from the paper alone, and used by nothing but `benchmarks.tridiagonal`. Weights of layer i
are `W_i`, `(n_i + 1, m_i)` with the bias as the last row, so that `F̃_ij V = Ā_ij V G_ijᵀ` for
`Ā_ij = E[ā_i ā_jᵀ]` of the layers' inputs with a one, and `G_ij = E[g_i g_jᵀ]`.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

Matrices = list[np.ndarray]


@dataclasses.dataclass
class Factors:
    """Averages of the factors of a chain.

    Args:
        inputs: `Ā_ii` of each layer.
        outputs: `G_ii`.
        next_inputs: `Ā_i,i+1` of each layer but the last.
        next_outputs: `G_i,i+1`.
    """

    inputs: Matrices
    outputs: Matrices
    next_inputs: Matrices
    next_outputs: Matrices

    def moved(self, batch: "Factors", decay: float) -> "Factors":
        """`decay` times these and the rest of those of a batch."""
        return Factors(
            *(
                [decay * old + (1 - decay) * new for old, new in zip(own, others, strict=True)]
                for own, others in zip(
                    dataclasses.astuple(self), dataclasses.astuple(batch), strict=True
                )
            )
        )

    def damped(self, gamma: float) -> "Factors":
        """With `π γ` and `γ / π` on the diagonals (section 6.3)."""
        inputs, outputs = [], []
        for omega, gradients in zip(self.inputs, self.outputs, strict=True):
            pi = np.sqrt(np.trace(omega) / len(omega) / (np.trace(gradients) / len(gradients)))
            inputs.append(omega + pi * gamma * np.eye(len(omega)))
            outputs.append(gradients + gamma / pi * np.eye(len(gradients)))
        return dataclasses.replace(self, inputs=inputs, outputs=outputs)


class BlockDiagonal:
    """`F̌⁻¹`, section 4.2.

    Args:
        factors: Damped factors.
    """

    def __init__(self, factors: Factors):
        self._left = [np.linalg.inv(part) for part in factors.inputs]
        self._right = [np.linalg.inv(part) for part in factors.outputs]

    def times(self, vectors: Sequence[np.ndarray]) -> Matrices:
        """`F̌⁻¹ v`."""
        return [
            left @ v @ right
            for left, v, right in zip(self._left, vectors, self._right, strict=True)
        ]


class BlockTridiagonal:
    """`F̂⁻¹ = Ξᵀ Λ Ξ`, section 4.3: layers form a chain of Gaussian variables.

    Args:
        factors: Damped factors.
    """

    def __init__(self, factors: Factors):
        self._last = BlockDiagonal(factors)
        # Ψ_i,i+1 = F̃_i,i+1 F̃_i+1,i+1⁻¹
        self._psi = [
            (_times_inverse(a, a_next), _times_inverse(g, g_next))
            for a, a_next, g, g_next in zip(
                factors.next_inputs,
                factors.inputs[1:],
                factors.next_outputs,
                factors.outputs[1:],
                strict=True,
            )
        ]
        # Σ_i|i+1 = F̃_ii - Ψ F̃_i+1,i+1 Ψᵀ
        self._conditional = [
            _InverseOfDifference(omega, gradients, psi_a @ a.T, psi_g @ g.T)
            for omega, gradients, (psi_a, psi_g), a, g in zip(
                factors.inputs[:-1],
                factors.outputs[:-1],
                self._psi,
                factors.next_inputs,
                factors.next_outputs,
                strict=True,
            )
        ]

    def times(self, vectors: Sequence[np.ndarray]) -> Matrices:
        """`F̂⁻¹ v`."""
        reduced = [
            v - psi_a @ following @ psi_g.T
            for v, following, (psi_a, psi_g) in zip(
                vectors[:-1], vectors[1:], self._psi, strict=True
            )
        ]
        scaled = [part.times(u) for part, u in zip(self._conditional, reduced, strict=True)]
        scaled.append(self._last.times(vectors)[-1])
        return [scaled[0]] + [
            w - psi_a.T @ before @ psi_g
            for w, before, (psi_a, psi_g) in zip(scaled[1:], scaled[:-1], self._psi, strict=True)
        ]


class _InverseOfDifference:
    """`(A ⊗ B - C ⊗ D)⁻¹` for positive definite A, B and the difference (appendix B)."""

    def __init__(self, a: np.ndarray, b: np.ndarray, c: np.ndarray, d: np.ndarray):
        self._left, left_values = _joint_basis(a, c)
        self._right, right_values = _joint_basis(b, d)
        self._values = 1 - np.outer(left_values, right_values)

    def times(self, vector: np.ndarray) -> np.ndarray:
        """Multiplies."""
        inner = self._left.T @ vector @ self._right / self._values
        return self._left @ inner @ self._right.T


def _joint_basis(a: np.ndarray, c: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`K` and `s` with `Kᵀ A K = I` and `Kᵀ C K = diag(s)`."""
    values, vectors = np.linalg.eigh(a)
    root = vectors / np.sqrt(values)
    whitened = root.T @ c @ root
    values, vectors = np.linalg.eigh((whitened + whitened.T) / 2)
    return root @ vectors, values


def _times_inverse(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """`A B⁻¹` for symmetric B."""
    return np.linalg.solve(b, a.T).T
