"""Means over data of what curvature blocks are made of, for each matrix of a model."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from keras_kfc.analysis.batches import Batches
from keras_kfc.curvature.api import BlockLayout
from keras_kfc.losses.derivatives import output_derivatives
from keras_kfc.losses.terms import loss_terms
from keras_kfc.maps.weights import WeightMatrix
from keras_kfc.passes.capture import Capture
from keras_kfc.passes.records import LayerRecord
from keras_kfc.passes.statistics import ExampleSubset, batch_size_of, measure


@dataclasses.dataclass(frozen=True)
class MeasuredMatrix:
    """One matrix of a layer, with what data tell of it.

    Args:
        path: Path of the matrix.
        matrix: The matrix.
        layout: What was measured.
        moments: Means over all examples, float64, in the order of the layout's factors.
    """

    path: str
    matrix: WeightMatrix
    layout: BlockLayout
    moments: list[np.ndarray]


def mean_moments(
    batches: Batches, fisher: str, seed: int, layout_for: Callable[[LayerRecord], Any]
) -> list[MeasuredMatrix]:
    """Measures all matrices of an instrumented model that a forward pass uses.

    Args:
        batches: The model, its loss and data.
        fisher: One of `keras_kfc.losses.derivatives.FISHERS`.
        seed: Seed of random numbers.
        layout_for: What to measure of a matrix, or None to leave it out.

    Returns:
        One for each matrix, in the order of their first use.
    """
    noted: list[bool] = []  # one line for all batches and traces
    known: dict[int, tuple[str, WeightMatrix]] = {}
    layouts: dict[int, Any] = {}

    def batch_sums(inputs: Any, targets: Any, batch_seed: tf.Tensor) -> list[list[tf.Tensor]]:
        with Capture() as capture:
            outputs = batches.call(inputs)
        size = batch_size_of(outputs)
        terms = loss_terms(batches.compiled, targets, outputs)
        derivatives = output_derivatives(terms, fisher, batch_seed)
        if not noted:
            noted.append(derivatives.log_notes())
        for key, record in capture.records.items():
            if key not in known and (layout := layout_for(record)) is not None:
                known[key], layouts[key] = (record.path, record.matrix), layout
        statistics = measure(capture, derivatives, ExampleSubset(size), layouts)
        return [
            [tf.cast(size, part.dtype) * part for part in statistics.moments[key]]
            for key in layouts
        ]

    function = batches.function(batch_sums)
    totals: list[list[np.ndarray]] = []
    for start, _, inputs, targets in batches:
        sums = function(inputs, targets, tf.constant([seed, start], tf.int64))
        shares = [[p.numpy().astype("float64") / batches.examples for p in own] for own in sums]
        totals = (
            [
                [a + b for a, b in zip(*pair, strict=True)]
                for pair in zip(totals, shares, strict=True)
            ]
            if totals
            else shares
        )
    return [
        MeasuredMatrix(*known[key], layouts[key], own)
        for key, own in zip(layouts, totals, strict=True)
    ]
