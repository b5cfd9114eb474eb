"""Averages of variables over replicas, all in one exchange."""

import dataclasses
from collections.abc import Sequence

import keras
import tensorflow as tf

from keras_kfc.placement.api import Placement
from keras_kfc.placement.packing import pack, unpack


@dataclasses.dataclass(frozen=True)
class WeightedVariables:
    """Variables that are means, and how much each replica's copies of them count.

    Args:
        weight: A scalar variable, not negative.
        variables: Variables of its dtype.
        symmetric: Which of them are stacks of symmetric matrices.
    """

    weight: keras.Variable
    variables: Sequence[keras.Variable]
    symmetric: Sequence[bool]


def average(placement: Placement, groups: Sequence[WeightedVariables]) -> None:
    """Gives all copies of variables their weighted means; in cross-replica context.

    Weights become their own means. Where all of them are zero, variables become zero, too.

    Args:
        placement: Where they are.
        groups: What to average, with one exchange for each dtype.
    """
    dtypes = {group.weight.dtype: None for group in groups}
    for dtype in dtypes:
        _average_of_one_dtype(placement, [g for g in groups if g.weight.dtype == dtype])


def _average_of_one_dtype(placement: Placement, groups: Sequence[WeightedVariables]) -> None:
    variables = [variable for group in groups for variable in group.variables]
    symmetric = [each for group in groups for each in group.symmetric]
    owners = [i for i, group in enumerate(groups) for _ in group.variables]
    copies = list(zip(*map(placement.copies, variables), strict=True))
    weights = list(zip(*(placement.copies(group.weight) for group in groups), strict=True))
    parts = []
    for own, own_weights in zip(copies, weights, strict=True):
        weighted = [own_weights[i] * value for i, value in zip(owners, own, strict=True)]
        parts.append(pack([*weighted, tf.stack(own_weights)], [*symmetric, False]))
    shapes = [tuple(variable.shape) for variable in variables]
    *sums, totals = unpack(
        placement.sum_parts(parts), [*shapes, (len(groups),)], [*symmetric, False]
    )
    for variable, total, owner in zip(variables, sums, owners, strict=True):
        variable.value.assign(tf.math.divide_no_nan(total, totals[owner]))
    for number, group in enumerate(groups):
        group.weight.value.assign(totals[number] / placement.count)


def add_up(placement: Placement, counter: keras.Variable) -> None:
    """Adds what each replica has counted since all agreed; in cross-replica context.

    Args:
        placement: Where the copies are.
        counter: An integer variable.
    """
    copies = zip(placement.numbers, placement.copies(counter), strict=True)
    parts = [
        tf.one_hot(number, placement.count, dtype=copy.dtype) * copy for number, copy in copies
    ]
    counts = placement.sum_parts(parts)
    before = tf.reduce_min(counts)
    counter.value.assign(before + tf.reduce_sum(counts - before))
