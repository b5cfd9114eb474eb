"""Kronecker factors that are the partial traces of the Fisher block."""

import dataclasses
from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from keras_kfc.curvature.eigenform import Eigenform
from keras_kfc.curvature.layout import KroneckerLayout
from keras_kfc.maps.partial_traces import partial_traces


@dataclasses.dataclass(frozen=True)
class TracedLayout(KroneckerLayout):
    """The layout of factors whose product has the trace of the block twice.

    Both are kept as they are measured, since only sums over examples can be averaged over batches
    and replicas; the block is `Ω ⊗ Γ / tr Γ`.
    """

    needs_inputs = True
    gamma_has_unit_trace = True

    def from_inputs(
        self,
        inputs: Sequence[tf.Tensor],
        batch_size: tf.Tensor,
        masks: Sequence[tf.Tensor | None],
    ) -> tuple[tf.Tensor, ...]:
        """Nothing: inputs alone do not tell."""
        del inputs, batch_size, masks
        return ()

    def from_pass(
        self,
        inputs: Sequence[tf.Tensor],
        derivatives: Sequence[tf.Tensor],
        batch_size: tf.Tensor,
        masks: Sequence[tf.Tensor | None],
    ) -> tuple[tf.Tensor, ...]:
        """Omega and gamma of one batch and one backward pass."""
        parts = (self.input_parts, self.output_parts)
        return partial_traces(
            self.linear_map, inputs, derivatives, batch_size, self.use_bias, parts, masks
        )

    def eigenform(self, factors: Sequence[np.ndarray]) -> Eigenform:
        """`Ω ⊗ Γ / tr Γ`, of factors that are whole."""
        omega, gamma = factors
        trace = np.trace(gamma, axis1=1, axis2=2)[:, None, None]
        return super().eigenform((omega, gamma / np.where(trace > 0, trace, 1.0)))
