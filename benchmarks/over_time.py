"""Models of how the steps of a sequence are correlated, on recurrent layers.

`python -m benchmarks.over_time` trains the LSTM of `benchmarks.family_nets` with the structures of
Martens, Ba & Johnson (2018, "Kronecker-factored curvature approximations for recurrent neural
networks"), written from the paper as structures of keras_kfc, and with the settings that
keras_kfc has for weights that are used at many positions.

With `A_d = E[ā_t+d ā_tᵀ]` and `G_d` likewise of derivatives, the block of weights that are used in
T steps is `F = Σ_d (T - |d|) A_d ⊗ G_d`. In a linear Gaussian chain `A_d = Ψ_A^d A_0`. In the
coordinates in which `A_0` and `G_0` are identities, with `Ψ = Ψ_A ⊗ Ψ_G`:

    independent  `F = T I`: steps are uncorrelated
    symmetric    `Ψ_A` and `Ψ_G` are symmetric, and F diagonal in their eigenvectors (option 1)
    long         T is infinite: `F / T = (I - Ψ)⁻¹ (I - Ψ Ψᵀ) (I - Ψᵀ)⁻¹` (option 2)
"""

import argparse
import dataclasses
import os
from collections.abc import Sequence
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import tensorflow as tf

from benchmarks.families import train
from benchmarks.harness import report
from keras_kfc.curvature.api import structure
from keras_kfc.curvature.averaging import AveragedBlock, store_inverses
from keras_kfc.curvature.shared import BlockStructure, LayoutOfExamples
from keras_kfc.linalg.damping import block_damping
from keras_kfc.linalg.stacks import Invert, invert_stacks
from keras_kfc.maps.api import LinearMap, masked

# Below this, correlations between far steps cancel nearly all of a coordinate of F.
_LEAST = 1e-3
SETTINGS = (
    "KFC(cosine(0.03), structure='independent')",
    "KFC(cosine(0.03), structure='symmetric')",
    "KFC(cosine(0.03), structure='long')",
    "KFC(cosine(0.03), weight_sharing='expand')",
    "KFC(cosine(0.03), weight_sharing='reduce')",
    "KFC(cosine(0.03))",
)


@dataclasses.dataclass(frozen=True)
class ChainLayout(LayoutOfExamples):
    """What a chain is measured by: moments of steps, and of steps and the next ones."""

    symmetric_factors = frozenset({"omega", "gamma"})

    @property
    def factor_shapes(self) -> dict[str, tuple[int, int, int]]:
        """`T A_0`, `T A_1`, `G_0`, `G_1`, and T."""
        _, n, m = self.weights_shape
        rows, columns = (1, n, n), (1, m, m)
        return {
            **{"omega": rows, "omega_next": rows},
            **{"gamma": columns, "gamma_next": columns},
            "steps": (1, 1, 1),
        }

    @property
    def inverse_shapes(self) -> dict[str, tuple[int, int, int]]:
        """What the inverses of the three models are made of."""
        _, n, m = self.weights_shape
        rows, columns = (1, n, n), (1, m, m)
        return {
            **{"omega_root": rows, "gamma_root": columns},
            **{"omega_psi": rows, "gamma_psi": columns},
            **{"omega_vectors": rows, "gamma_vectors": columns},
            "scale": (1, n, m),
        }

    def from_pass(
        self,
        inputs: Sequence[tf.Tensor],
        derivatives: Sequence[tf.Tensor],
        batch_size: tf.Tensor,
        masks: Sequence[tf.Tensor | None],
    ) -> tuple[tf.Tensor, ...]:
        """Moments of one batch, of the one use that a recurrent layer has."""
        (ds,), (mask,) = derivatives, masks
        steps = 1 if len(ds.shape) == 2 else ds.shape[1]
        rows = self.rows(masked(inputs[0], mask))
        parts = (rows, self.columns(masked(ds, mask)))
        a, g = (tf.reshape(part, (-1, steps, part.shape[2])) for part in parts)
        count = tf.cast(batch_size, a.dtype)

        def moment(first: tf.Tensor, second: tf.Tensor, scale: float) -> tf.Tensor:
            return scale * tf.einsum("bti,btj->ij", first, second)[None] / count

        next_ones = steps / max(steps - 1, 1)
        return (
            moment(a, a, 1.0),
            moment(a[:, 1:], a[:, :-1], next_ones),
            moment(g, g, 1 / steps),
            moment(g[:, 1:], g[:, :-1], next_ones / steps),
            tf.fill((1, 1, 1), tf.cast(steps, a.dtype)),
        )

    def sum_over_examples(self, inputs: tf.Tensor, derivatives: tf.Tensor) -> tf.Tensor:
        """Not of use here."""
        raise NotImplementedError

    def eigenform(self, factors: Sequence[np.ndarray]) -> Any:
        """Not of use here."""
        raise NotImplementedError


class ChainBlock(AveragedBlock):
    """Moments of a chain and what its inverse is made of."""

    def multiply(self, weights: tf.Tensor) -> tf.Tensor:
        """The damped inverse times a matrix of the layer's weights, `(1, n, m)`."""
        names = self.layout.inverse_shapes
        parts = {name: tf.convert_to_tensor(self.state[name]) for name in names}
        return inverse_times(parts, weights)


def inverse_times(parts: dict[str, tf.Tensor], weights: tf.Tensor) -> tf.Tensor:
    """`F⁻¹ V`, by what `chain_of` gives."""

    def turned(left: str, matrix: tf.Tensor, right: str, transposed: bool = False) -> tf.Tensor:
        return tf.matmul(
            tf.matmul(parts[left], matrix, transpose_a=transposed),
            parts[right],
            transpose_b=not transposed,
        )

    v = turned("omega_root", weights, "gamma_root")
    v = v - turned("omega_psi", v, "gamma_psi")
    v = turned("omega_vectors", v, "gamma_vectors", transposed=True) * parts["scale"]
    v = turned("omega_vectors", v, "gamma_vectors")
    v = v - turned("omega_psi", v, "gamma_psi", transposed=True)
    return turned("omega_root", v, "gamma_root")


def chain_of(model: str, factors: dict[str, tf.Tensor], shifts: Sequence[Any]) -> dict[str, Any]:
    """What the inverse of one of the three models is made of, by the names of `inverse_shapes`.

    Args:
        model: `"independent"`, `"symmetric"` or `"long"`.
        factors: By the names of `factor_shapes`.
        shifts: What is added to the diagonals of omega and gamma.
    """
    parts, values = {}, []
    for name, shift in zip(("omega", "gamma"), shifts, strict=True):
        eye = tf.eye(factors[name].shape[1], dtype=factors[name].dtype)[None]
        found, vectors = tf.linalg.eigh(factors[name] + shift * eye)
        root = tf.matmul(vectors / tf.sqrt(found)[:, None], vectors, transpose_b=True)
        psi = root @ factors[f"{name}_next"] @ root
        if model == "symmetric":
            psi = (psi + tf.linalg.matrix_transpose(psi)) / 2
            own, vectors = tf.linalg.eigh(psi)
            psi = tf.zeros_like(psi)
        elif model == "long":
            own, vectors = tf.linalg.eigh(tf.matmul(psi, psi, transpose_b=True))
        else:
            own, vectors, psi = tf.zeros_like(found), eye, tf.zeros_like(psi)
        parts.update({f"{name}_root": root, f"{name}_psi": psi, f"{name}_vectors": vectors})
        values.append(own)
    products = values[0][:, :, None] * values[1][:, None, :]
    summed = model == "symmetric"
    spectrum = mean_of_powers(products, factors["steps"]) if summed else 1 - products
    return {**parts, "scale": 1 / tf.maximum(spectrum, _LEAST)}


def mean_of_powers(x: tf.Tensor, steps: tf.Tensor) -> tf.Tensor:
    """`Σ_d (1 - |d| / T) x^|d|`, over all |d| < T."""
    result, power = tf.ones_like(x), tf.ones_like(x)
    _, result, _ = tf.while_loop(
        lambda d, *_: d < tf.reduce_max(steps),
        lambda d, total, last: (d + 1, total + 2 * (1 - d / steps) * last * x, last * x),
        (tf.ones((), x.dtype), result, power),
    )
    return result


def _refresh_of(model: str) -> Any:
    class Refresh:
        """New inverses of chains."""

        def __init__(self, blocks: Sequence[ChainBlock]):
            self._blocks = blocks
            names = [block.layout.factor_shapes for block in blocks]
            self._factors = [
                {name: tf.convert_to_tensor(block.state[name]) for name in own}
                for block, own in zip(blocks, names, strict=True)
            ]

        @property
        def trace(self) -> tf.Tensor:
            """As if steps were uncorrelated."""
            traces = [
                tf.linalg.trace(f["omega"]) * tf.linalg.trace(f["gamma"]) for f in self._factors
            ]
            return tf.reduce_sum(tf.concat(traces, axis=0))

        @property
        def size(self) -> float:
            """Number of weights."""
            return float(
                sum(np.prod(f["omega"].shape[1] * f["gamma"].shape[1]) for f in self._factors)
            )

        def run(
            self, damping: tf.Tensor, network_mean: tf.Tensor | None, invert: Invert = invert_stacks
        ) -> tf.Tensor:
            """Computes and stores them."""
            del invert
            inverses = []
            for block, own in zip(self._blocks, self._factors, strict=True):
                means = [
                    tf.linalg.trace(own[name]) / own[name].shape[1] for name in ("omega", "gamma")
                ]
                parts = chain_of(
                    model, own, block_damping(means[0], means[1], damping, network_mean)
                )
                inverses.append([parts[name] for name in block.layout.inverse_shapes])
            return store_inverses(self._blocks, inverses)

    return Refresh


def register(model: str) -> None:
    """Makes one of the models a structure that `KFC(structure=...)` knows."""

    class Chain(BlockStructure[ChainLayout]):
        """A model of steps."""

        block_type, refresh_type = ChainBlock, _refresh_of(model)

        def layout(
            self,
            linear_map: LinearMap,
            use_bias: bool,
            max_dim: int | None,
            weight_sharing: str = "expand",
        ) -> ChainLayout:
            """Moments of a layer without groups."""
            del max_dim, weight_sharing
            return ChainLayout(linear_map, use_bias)

    structure(model)(Chain)


def main() -> None:
    """Trains and prints."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.over_time", description=__doc__)
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS))
    parser.add_argument("--iterations", type=int, default=300)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    arguments = parser.parse_args()
    for model in ("independent", "symmetric", "long"):
        register(model)
    rows = []
    for setting in arguments.settings:
        for seed in arguments.seeds:
            run = train("lstm", setting, seed, arguments.iterations)
            rows.append({"seed": seed, **dataclasses.asdict(run)})
            print(rows[-1], flush=True)
    report("over-time", "An LSTM on rows of Fashion-MNIST", rows)


if __name__ == "__main__":
    main()
