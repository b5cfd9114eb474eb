"""Derivatives of single examples' outputs with regard to the weights of blocks."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from keras_kfc.analysis.batches import call_model
from keras_kfc.analysis.blocks import AnalysedBlock
from keras_kfc.curvature.full import FullLayout
from keras_kfc.maps.api import masked
from keras_kfc.passes.capture import Capture


class ExampleJacobians:
    """The Jacobian of each example's outputs, block by block, as functions of a batch of inputs.

    Args:
        model: The model, instrumented.
        latent: From the model's outputs to what is differentiated, `(B, K)`.
        blocks: The blocks.
    """

    def __init__(
        self, model: Any, latent: Callable[[tf.Tensor], tf.Tensor], blocks: Sequence[AnalysedBlock]
    ):
        self._model, self._latent, self._blocks = model, latent, list(blocks)
        self._function: Any = self._compute
        if not getattr(model, "run_eagerly", False):
            self._function = tf.function(self._compute, autograph=False, reduce_retracing=True)

    def __call__(self, inputs: Any) -> tuple[np.ndarray, list[np.ndarray]]:
        """Outputs and their derivatives.

        Args:
            inputs: A batch.

        Returns:
            Outputs, `(B, K)`, and for each block `(K, B, G, n, m)`, float64.
        """
        outputs, *jacobians = self._function(inputs)
        return (
            outputs.numpy().astype("float64"),
            [jacobian.numpy().astype("float64") for jacobian in jacobians],
        )

    def _compute(self, inputs: Any) -> list[tf.Tensor]:
        with Capture() as capture:
            outputs = self._latent(call_model(self._model, inputs))
        columns = tf.eye(outputs.shape[1], dtype=outputs.dtype)

        def derivatives_of(column: tf.Tensor) -> list[tf.Tensor]:
            start = tf.broadcast_to(column, tf.shape(outputs))
            derivatives = capture.differentiate([outputs], [start])
            return [self._of_block(block, capture, derivatives) for block in self._blocks]

        dtypes = [self._dtype(block) for block in self._blocks]
        return [outputs, *tf.map_fn(derivatives_of, columns, fn_output_signature=dtypes)]

    @staticmethod
    def _dtype(block: AnalysedBlock) -> tf.DType:
        wide = str(block.matrix.kernel.dtype) == "float64"
        return tf.float64 if wide else tf.float32

    def _of_block(self, block: AnalysedBlock, capture: Capture, derivatives: Any) -> tf.Tensor:
        """The sum over the uses of a matrix, `(B, G, n, m)`."""
        key = id(block.matrix.kernel)
        layout = FullLayout(block.linear_map, block.indices.bias is not None)
        pairs = zip(capture.records[key].uses, derivatives[key], strict=True)
        parts = [
            layout.example_gradients(use.dense_inputs(), masked(ds, use.mask))
            for use, ds in pairs
            if ds is not None
        ]
        return tf.cast(tf.add_n(parts), self._dtype(block))
