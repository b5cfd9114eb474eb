"""The Fisher block of one layer as a Kronecker product of two factors, `Ω ⊗ Γ`.

Omega is made from the layer's inputs, gamma from the derivatives of its pre-activations
(Grosse & Martens 2016, section 3; A and G in K-FAC papers and other packages). The damped
inverse is `(Ω + π √λ I)⁻¹ ⊗ (Γ + √λ/π I)⁻¹`. In the setting "trace"
(`keras_kfc.curvature.traced`) either is measured from both.
"""

import dataclasses
from collections.abc import Sequence

import keras
import numpy as np
import tensorflow as tf

from keras_kfc.curvature.api import structure
from keras_kfc.curvature.averaging import AveragedBlock, store_inverses
from keras_kfc.curvature.layout import KroneckerLayout, layout_of
from keras_kfc.curvature.shared import BlockStructure
from keras_kfc.curvature.traced import TracedLayout
from keras_kfc.linalg.damping import block_traces, with_unit_traces
from keras_kfc.linalg.stacks import Invert, invert_blocks, invert_stacks
from keras_kfc.maps.api import LinearMap


class KroneckerBlock(AveragedBlock):
    """Factors and damped inverses of one layer.

    Args:
        path: Path of the layer, for names and messages.
        layout: How the factors are stored.
        indices: Where its variables are among the optimizer's trainable ones.
        dtype: Dtype of factors and inverses.
        add_variable: The optimizer's `add_variable`.
    """

    layout: KroneckerLayout

    @property
    def omega(self) -> keras.Variable:
        """Moving average of the input factor, `(G * P, R, R)`; see `keras_kfc.curvature.layout`."""
        return self._factors["omega"]

    @property
    def gamma(self) -> keras.Variable:
        """Moving average of the output factor, `(G * Q, t, t)`."""
        return self._factors["gamma"]

    @property
    def omega_inverse(self) -> keras.Variable:
        """Damped inverse of omega, likewise."""
        return self._inverses["omega_inverse"]

    @property
    def gamma_inverse(self) -> keras.Variable:
        """Damped inverse of gamma, likewise."""
        return self._inverses["gamma_inverse"]

    def matrices(self, name: str) -> list[np.ndarray]:
        """The diagonal blocks of a factor or an inverse, without the rows that fill them up.

        Args:
            name: `"omega"`, `"gamma"`, `"omega_inverse"` or `"gamma_inverse"`.
        """
        rows = (
            self.layout.omega_row_mask if name.startswith("omega") else self.layout.gamma_row_mask
        )
        return [
            part[np.ix_(own, own)] for part, own in zip(self.state[name].numpy(), rows, strict=True)
        ]

    def multiply(self, weights: tf.Tensor) -> tf.Tensor:
        """`Ω⁻¹ D Γ⁻¹` of a matrix D of the layer's weights, `(G, n, m)`."""
        inverses = (
            tf.convert_to_tensor(self.omega_inverse),
            tf.convert_to_tensor(self.gamma_inverse),
        )
        return self.layout.multiply(inverses[0], weights, inverses[1])

    def costs(self) -> tuple[float, float]:
        """Products that the inverses take by a whole gradient, and by each row of a product."""
        return self.layout.costs()

    def multiply_product(
        self, inputs: tf.Tensor, derivatives: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """`Ω⁻¹ Aᵀ` and `E Γ⁻¹` of the rows of a gradient, `(G, R, n)` and `(G, R, m)`."""
        inverses = (
            tf.convert_to_tensor(self.omega_inverse),
            tf.convert_to_tensor(self.gamma_inverse),
        )
        return self.layout.multiply_product(inverses[0], inputs, derivatives, inverses[1])


class KroneckerRefresh:
    """New inverses for Kronecker blocks, computed all together.

    Args:
        blocks: The blocks.
    """

    def __init__(self, blocks: Sequence[KroneckerBlock]):
        self._blocks = blocks
        self._omegas = [tf.convert_to_tensor(block.omega) for block in blocks]
        self._gammas = [tf.convert_to_tensor(block.gamma) for block in blocks]
        shapes = [block.layout.block_shape for block in blocks]
        traces = block_traces(self._omegas, self._gammas, shapes)
        unit = [block.layout.gamma_has_unit_trace for block in blocks]
        self._gammas, self._traces = with_unit_traces(self._gammas, traces, unit)

    @property
    def trace(self) -> tf.Tensor:
        """`Σ tr Ω tr Γ`, a scalar."""
        return self._traces.total

    @property
    def size(self) -> float:
        """Number of rows of `Ω ⊗ Γ`, of all blocks together."""
        return self._traces.size

    def run(
        self, damping: tf.Tensor, network_mean: tf.Tensor | None, invert: Invert = invert_stacks
    ) -> tf.Tensor:
        """Inverts all factors."""
        inverses = invert_blocks(
            self._omegas, self._gammas, self._traces, damping, network_mean, invert
        )
        return store_inverses(self._blocks, list(zip(*inverses, strict=True)))


@structure("kronecker")
class Kronecker(BlockStructure[KroneckerLayout]):
    """The structure of the paper."""

    block_type, refresh_type = KroneckerBlock, KroneckerRefresh

    def layout(
        self,
        linear_map: LinearMap,
        use_bias: bool,
        max_dim: int | None,
        weight_sharing: str = "expand",
    ) -> KroneckerLayout:
        """Factors in as few parts as the limit allows."""
        layout = layout_of(linear_map, use_bias, max_dim)
        layout = dataclasses.replace(layout, weight_sharing=weight_sharing)
        return TracedLayout(**vars(layout)) if weight_sharing == "trace" else layout
