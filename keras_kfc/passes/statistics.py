"""From one captured forward pass to the Kronecker factors of its batch.

Joins what the modules below know separately: where backward passes start
(`derivatives`), how they run (`capture`) and what they give (`factors`).
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_kfc.losses.derivatives import OutputDerivatives
from keras_kfc.maps.api import FactorLayout
from keras_kfc.passes.capture import Capture, Use


def batch_size_of(y_pred: Any) -> tf.Tensor:
    """Number of examples in a batch of outputs, a scalar."""
    return tf.shape(keras.tree.flatten(y_pred)[0])[0]


@dataclasses.dataclass
class ExampleSample:
    """The examples of a batch that factors are estimated from, or all of them.

    They follow each other from a random one on, around the end of the batch, so that
    each example (each row, where tensors have several for one) is as likely as any
    other: the estimate is unbiased.

    Args:
        batch_size: Number of examples in the batch, B.
        count: Number of examples to take, or None for all.
        start: The first one, as a fraction of the batch in [0, 1); not needed for all.
    """

    batch_size: tf.Tensor
    count: int | None = None
    start: tf.Tensor | None = None

    @property
    def size(self) -> tf.Tensor:
        """Number of examples in the sample, a scalar."""
        return self.batch_size if self.count is None else tf.minimum(self.count, self.batch_size)

    def take(self, tensors: Sequence[tf.Tensor]) -> tuple[list[tf.Tensor], tf.Tensor]:
        """Takes the sample's share of each tensor's rows.

        Args:
            tensors: Tensors with examples along the first axis, or several rows for
                each example.

        Returns:
            The rows, and the number of examples that they amount to.
        """
        if self.count is None:
            return list(tensors), self.batch_size
        taken, rows = [], []
        for tensor in tensors:
            length = tf.shape(tensor, tf.int64)[0]
            share = length * self.count // tf.maximum(tf.cast(self.batch_size, tf.int64), 1)
            share = tf.minimum(length, tf.maximum(share, 1))
            first = tf.cast(self.start * tf.cast(length, tf.float32), tf.int64)
            taken.append(tf.gather(tensor, (first + tf.range(share)) % tf.maximum(length, 1)))
            rows.append((share, length))
        part, whole = (
            tf.cast(tf.add_n(list(counts)), tf.float32) for counts in zip(*rows, strict=True)
        )
        return taken, tf.cast(self.batch_size, tf.float32) * part / tf.maximum(whole, 1.0)


def draw_examples(batch_size: tf.Tensor, count: int | None, seed: tf.Tensor) -> ExampleSample:
    """Draws the examples of a batch to estimate factors from.

    Args:
        batch_size: Number of examples in the batch.
        count: Number of examples to take, or None for all.
        seed: Two integers; others than those that targets are drawn with follow from them.
    """
    if count is None:
        return ExampleSample(batch_size)
    own_seed = seed + tf.constant([1 << 62, 0], seed.dtype)
    start = tf.random.stateless_uniform((), own_seed, alg="philox")
    return ExampleSample(batch_size, count, start)


@dataclasses.dataclass(frozen=True)
class OutputFactor:
    """The output factor of one layer in one batch.

    Args:
        gamma: The factor.
        uses: The layer's uses that it comes from, and that the input factor has to come from.
    """

    gamma: tf.Tensor
    uses: Sequence[Use]


def batch_omegas(
    uses: Mapping[int, Sequence[Use]], sample: ExampleSample, partitions: Mapping[int, FactorLayout]
) -> dict[int, tf.Tensor]:
    """Input factors of one batch.

    Args:
        uses: For each record key that is wanted, the layer's uses.
        sample: The examples to use.
        partitions: For each of these keys, the layout of the factors.

    Returns:
        `{key: omega}`.
    """

    def omega(partition: FactorLayout, uses: Sequence[Use]) -> tf.Tensor:
        inputs, size = sample.take([use.dense_inputs() for use in uses])
        return partition.omega(inputs, size, _masks(uses, sample))

    return {key: omega(partitions[key], own) for key, own in uses.items()}


def batch_gammas(
    capture: Capture,
    outputs: OutputDerivatives,
    sample: ExampleSample,
    partitions: Mapping[int, FactorLayout],
) -> dict[int, OutputFactor]:
    """Output factors of one batch, from one or more backward passes.

    Uses that the outputs do not depend on are left out, such as those of a forward pass for
    something else, unless a layer has no others.

    Args:
        capture: The captured forward pass.
        outputs: What to start the backward passes from.
        sample: The examples to use.
        partitions: For each record key that is wanted, the layout of the factors.

    Returns:
        `{key: factor}`.
    """
    keys = [key for key in capture.records if key in partitions]
    uses: dict[int, Sequence[Use]] = {}

    def one_pass(index):
        derivatives = capture.differentiate(outputs.sources, outputs.derivatives(index))
        gammas = []
        for key in keys:
            pairs = list(zip(capture.records[key].uses, derivatives[key], strict=True))
            reached = [(use, d) for use, d in pairs if d is not None]
            reached = reached or [(use, tf.zeros_like(use.pre_activation)) for use, _ in pairs]
            uses[key] = [use for use, _ in reached]
            gammas.append(_gamma(partitions[key], [d for _, d in reached], uses[key], sample))
        return gammas

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
    return {key: OutputFactor(gamma, uses[key]) for key, gamma in zip(keys, gammas, strict=True)}


def ordinary_gammas(
    capture: Capture,
    scale: tf.Tensor,
    sample: ExampleSample,
    partitions: Mapping[int, FactorLayout],
) -> dict[int, OutputFactor]:
    """Output factors from the ordinary backward pass (empirical Fisher).

    Args:
        capture: A captured pass whose loss has been differentiated already.
        scale: What makes one example's derivative of the mean's: the batch
            size, over the loss scale where there is one.
        sample: The examples to use.
        partitions: For each record key that is wanted, the layout of the factors.

    Returns:
        `{key: factor}`, for layers that the backward pass reached, from the uses that it
        reached.
    """
    factors = {}
    for key, record in capture.records.items():
        uses = record.differentiated_uses()
        if key in partitions and uses:
            gamma = _gamma(partitions[key], [use.derivative for use in uses], uses, sample)
            factors[key] = OutputFactor(tf.cast(scale, gamma.dtype) ** 2 * gamma, uses)
    return factors


def _gamma(partition, derivatives, uses, sample):
    return partition.gamma(sample.take(derivatives)[0], _masks(uses, sample))


def _masks(uses: Sequence[Use], sample: ExampleSample) -> list[tf.Tensor | None]:
    """The sample's share of each use's mask."""
    masks = [use.mask for use in uses]
    return [None if mask is None else sample.take([mask])[0][0] for mask in masks]
