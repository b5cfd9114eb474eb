"""From one captured forward pass to what the curvature wants to know of its batch.

Joins what others know separately: where backward passes start (`keras_kfc.losses.derivatives`),
how they run (`keras_kfc.passes.capture`), and what is summed up (the layouts of the
curvature's blocks, as `Moments`).
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import keras
import tensorflow as tf

from keras_kfc.linalg.precision import all_finite
from keras_kfc.losses.derivatives import OutputDerivatives
from keras_kfc.passes.capture import Capture
from keras_kfc.passes.records import Use


def batch_size_of(y_pred: Any) -> tf.Tensor:
    """Number of examples in a batch of outputs, a scalar."""
    return tf.shape(keras.tree.flatten(y_pred)[0])[0]


@dataclasses.dataclass
class ExampleSubset:
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
        examples = tf.maximum(tf.cast(self.batch_size, tf.int64), 1)
        chosen = tf.cast(self.start * tf.cast(examples, tf.float32), tf.int64)
        taken, rows = [], []
        for tensor in tensors:
            length = tf.shape(tensor, tf.int64)[0]
            # All rows of the same examples, where each has as many.
            whole_rows = tf.equal(length % examples, 0)
            share = tf.minimum(length, tf.maximum(length * self.count // examples, 1))
            first = tf.where(
                whole_rows,
                chosen * (length // examples),
                tf.cast(self.start * tf.cast(length, tf.float32), tf.int64),
            )
            taken.append(tf.gather(tensor, (first + tf.range(share)) % tf.maximum(length, 1)))
            rows.append((share, length))
        part, whole = (
            tf.cast(tf.add_n(list(counts)), tf.float32) for counts in zip(*rows, strict=True)
        )
        return taken, tf.cast(self.batch_size, tf.float32) * part / tf.maximum(whole, 1.0)


def draw_examples(batch_size: tf.Tensor, count: int | None, seed: tf.Tensor) -> ExampleSubset:
    """Draws the examples of a batch to estimate factors from.

    Args:
        batch_size: Number of examples in the batch.
        count: Number of examples to take, or None for all.
        seed: Two integers; others than those that targets are drawn with follow from them.
    """
    if count is None:
        return ExampleSubset(batch_size)
    own_seed = seed + tf.constant([1 << 62, 0], seed.dtype)
    start = tf.random.stateless_uniform((), own_seed, alg="philox")
    return ExampleSubset(batch_size, count, start)


class Moments(Protocol):
    """What is summed up for one layer over a batch: means over its examples."""

    @property
    def needs_inputs(self) -> bool:
        """Whether `from_pass` looks at the inputs."""

    def from_inputs(
        self,
        inputs: Sequence[tf.Tensor],
        batch_size: tf.Tensor,
        masks: Sequence[tf.Tensor | None],
    ) -> tuple[tf.Tensor, ...]:
        """Moments of the inputs alone.

        Args:
            inputs: The layer's input in each of its uses.
            batch_size: Number of examples.
            masks: For each use, which positions count, or None for all.
        """

    def from_pass(
        self,
        inputs: Sequence[tf.Tensor],
        derivatives: Sequence[tf.Tensor],
        batch_size: tf.Tensor,
        masks: Sequence[tf.Tensor | None],
    ) -> tuple[tf.Tensor, ...]:
        """Moments of one backward pass, quadratic in the derivatives; passes are summed.

        Args:
            inputs: As above; empty unless `needs_inputs`.
            derivatives: `Ds` for each use: of one example's loss, not of the batch's mean.
            batch_size: As above.
            masks: As above.
        """


@dataclasses.dataclass(frozen=True)
class BatchStatistics:
    """What one batch tells of some layers.

    Args:
        moments: By record key, moments of the inputs and then of the backward passes. Layers
            that no backward pass has reached are missing.
        batch_is_finite: Whether all inputs are finite, a boolean scalar. A NaN can stop at a
            rectifier, so that layers above it look sound: where one layer's input is broken, the
            batch is.
    """

    moments: Mapping[int, tuple[tf.Tensor, ...]]
    batch_is_finite: tf.Tensor


def measure(
    capture: Capture,
    outputs: OutputDerivatives,
    sample: ExampleSubset,
    layouts: Mapping[int, Moments],
) -> BatchStatistics:
    """Statistics of one batch, from one or more second backward passes.

    Uses that the outputs do not depend on are left out, such as those of a forward pass for
    something else, unless a layer has no others.

    Args:
        capture: The captured forward pass.
        outputs: What to start the backward passes from.
        sample: The examples to use.
        layouts: For each record key that is wanted, what to measure.
    """
    keys = [key for key in capture.records if key in layouts]
    inputs = _Inputs(use for key in keys for use in capture.records[key].uses)
    uses: dict[int, Sequence[Use]] = {}

    def one_pass(index: int | tf.Tensor) -> list[tuple[tf.Tensor, ...]]:
        derivatives = capture.differentiate(outputs.sources, outputs.derivatives(index))
        moments = []
        for key in keys:
            pairs = list(zip(capture.records[key].uses, derivatives[key], strict=True))
            reached = [(use, d) for use, d in pairs if d is not None]
            reached = reached or [(use, tf.zeros_like(use.pre_activation)) for use, _ in pairs]
            uses[key] = [use for use, _ in reached]
            derivatives_of = [d for _, d in reached]
            moments.append(_of_pass(layouts[key], uses[key], derivatives_of, inputs, sample))
        return moments

    moments = one_pass(0)
    if not isinstance(outputs.count, int):
        _, moments = tf.while_loop(
            lambda index, _: index < outputs.count,
            lambda index, totals: (
                index + 1,
                tf.nest.map_structure(tf.add, totals, one_pass(index)),
            ),
            (tf.constant(1), moments),
            # Passes share the forward tensors: running them side by side only adds memory.
            parallel_iterations=1,
        )
    return _joined(dict(zip(keys, moments, strict=True)), uses, inputs, sample, layouts)


def measure_ordinary(
    capture: Capture,
    scale: tf.Tensor,
    sample: ExampleSubset,
    layouts: Mapping[int, Moments],
) -> BatchStatistics:
    """Statistics of one batch, from the ordinary backward pass (empirical Fisher).

    Only the uses that the backward pass reached count.

    Args:
        capture: A captured pass whose loss has been differentiated already.
        scale: What makes one example's derivative of the mean's: the batch
            size, over the loss scale where there is one.
        sample: The examples to use.
        layouts: For each record key that is wanted, what to measure.
    """
    moments: dict[int, tuple[tf.Tensor, ...]] = {}
    uses = {
        key: reached
        for key, record in capture.records.items()
        if key in layouts and (reached := record.differentiated_uses())
    }
    inputs = _Inputs(use for own in uses.values() for use in own)
    for key, own in uses.items():
        of_pass = _of_pass(layouts[key], own, [use.derivative for use in own], inputs, sample)
        moments[key] = tuple(tf.cast(scale, part.dtype) ** 2 * part for part in of_pass)
    return _joined(moments, uses, inputs, sample, layouts)


class _Inputs:
    """The inputs of some uses as dense tensors, each made once, in the graph of now."""

    def __init__(self, uses: Iterable[Use]):
        self._of_use = {id(use): use.dense_inputs() for use in uses}

    def of(self, uses: Sequence[Use]) -> list[tf.Tensor]:
        """Those of some uses."""
        return [self._of_use[id(use)] for use in uses]


def _joined(
    moments: Mapping[int, tuple[tf.Tensor, ...]],
    uses: Mapping[int, Sequence[Use]],
    inputs: _Inputs,
    sample: ExampleSubset,
    layouts: Mapping[int, Moments],
) -> BatchStatistics:
    """Statistics of all layers: moments of the inputs, then those of the backward passes."""

    def of_inputs(key: int) -> tuple[tf.Tensor, ...]:
        taken, size = sample.take(inputs.of(uses[key]))
        return layouts[key].from_inputs(taken, size, _masks(uses[key], sample))

    every = [tensor for own in uses.values() for tensor in inputs.of(own)]
    numbers = [tensor for tensor in every if tensor.dtype.is_floating]
    return BatchStatistics(
        {key: (*of_inputs(key), *of_passes) for key, of_passes in moments.items()},
        all_finite(numbers) if numbers else tf.constant(True),
    )


def _of_pass(
    layout: Moments,
    uses: Sequence[Use],
    derivatives: Sequence[Any],
    inputs: _Inputs,
    sample: ExampleSubset,
) -> tuple[tf.Tensor, ...]:
    for use, derivative in zip(uses, derivatives, strict=True):
        # Loops forget it, and the number of steps is good to know.
        derivative.set_shape(use.pre_activation.shape)
    needed = inputs.of(uses) if layout.needs_inputs else []
    taken, size = sample.take([*needed, *derivatives])
    return layout.from_pass(taken[: len(needed)], taken[len(needed) :], size, _masks(uses, sample))


def _masks(uses: Sequence[Use], sample: ExampleSubset) -> list[tf.Tensor | None]:
    """The sample's share of each use's mask."""
    masks = [use.mask for use in uses]
    return [None if mask is None else sample.take([mask])[0][0] for mask in masks]
