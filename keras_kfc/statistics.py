"""From one captured forward pass to the Kronecker factors of its batch.

Joins what the modules below know separately: where backward passes start
(`derivatives`), how they run (`capture`) and what they give (`factors`).
"""

from collections.abc import Mapping
from typing import Any

import keras
import tensorflow as tf

from keras_kfc.capture import Capture
from keras_kfc.derivatives import OutputDerivatives
from keras_kfc.partition import Partition


def batch_size_of(y_pred: Any) -> tf.Tensor:
    """Number of examples in a batch of outputs, a scalar."""
    return tf.shape(keras.tree.flatten(y_pred)[0])[0]


def batch_omegas(
    capture: Capture, batch_size: tf.Tensor, partitions: Mapping[int, Partition]
) -> dict[int, tf.Tensor]:
    """Input factors of one batch.

    Args:
        capture: The captured forward pass.
        batch_size: Number of examples.
        partitions: For each record key that is wanted, the layout of the factors.

    Returns:
        `{key: omega}`.
    """
    return {
        key: partitions[key].omega(record.dense_inputs(), batch_size)
        for key, record in capture.records.items()
        if key in partitions
    }


def batch_gammas(
    capture: Capture, outputs: OutputDerivatives, partitions: Mapping[int, Partition]
) -> dict[int, tf.Tensor]:
    """Output factors of one batch, from one or more backward passes.

    Args:
        capture: The captured forward pass.
        outputs: What to start the backward passes from.
        partitions: For each record key that is wanted, the layout of the factors.

    Returns:
        `{key: gamma}`.
    """
    keys = [key for key in capture.records if key in partitions]

    def one_pass(index):
        derivatives = capture.differentiate(outputs.sources, outputs.derivatives(index))
        return [partitions[key].gamma(derivatives[key]) for key in keys]

    gammas = one_pass(0)
    if not isinstance(outputs.count, int):
        _, gammas = tf.while_loop(
            lambda index, _: index < outputs.count,
            lambda index, totals: (
                index + 1,
                [total + part for total, part in zip(totals, one_pass(index), strict=True)],
            ),
            (tf.constant(1), gammas),
            # Passes share the forward tensors: running them side by side only adds memory.
            parallel_iterations=1,
        )
    return dict(zip(keys, gammas, strict=True))


def ordinary_gammas(
    capture: Capture, scale: tf.Tensor, partitions: Mapping[int, Partition]
) -> dict[int, tf.Tensor]:
    """Output factors from the ordinary backward pass (empirical Fisher).

    Args:
        capture: A captured pass whose loss has been differentiated already.
        scale: What makes one example's derivative of the mean's: the batch
            size, over the loss scale where there is one.
        partitions: For each record key that is wanted, the layout of the factors.

    Returns:
        `{key: gamma}`, for layers that the backward pass reached.
    """
    return {
        key: tf.cast(scale, tf.float32) ** 2 * partitions[key].gamma(record.ordinary_derivatives)
        for key, record in capture.records.items()
        if key in partitions and record.ordinary_derivatives
    }
