"""Kronecker factors of a model on given data, without training."""

import dataclasses
import random
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_kfc._compat.keras_internals import compile_loss, compiled_loss_of, takes_training
from keras_kfc.curvature.layout import KroneckerLayout
from keras_kfc.layers.instrument import temporarily_instrumented
from keras_kfc.losses.derivatives import FISHERS, output_derivatives
from keras_kfc.losses.terms import loss_terms
from keras_kfc.passes.capture import Capture
from keras_kfc.passes.statistics import ExampleSubset, batch_size_of, measure
from keras_kfc.utils.arguments import check_choice, check_positive_integer, check_seed
from keras_kfc.utils.texts import unused_name


@dataclasses.dataclass(frozen=True)
class KroneckerFactors:
    """The two factors of one layer's Fisher block `omega ⊗ gamma`.

    Attributes:
        omega: Input factor, float32, `(n, n)`, rows in the order (kernel row,
            kernel column, channel, 1); `(groups, n, n)` for grouped convolutions.
        gamma: Output factor, float32, `(m, m)`, m output channels;
            `(groups, m, m)` for grouped convolutions.
    """

    omega: np.ndarray
    gamma: np.ndarray


def kronecker_factors(
    model: keras.Model,
    x: Any,
    y: Any = None,
    *,
    loss: Any = None,
    fisher: str = "sampled",
    batch_size: int = 32,
    seed: int | None = None,
) -> dict[str, KroneckerFactors]:
    """Computes the Kronecker factors of every layer whose block is their product.

    Those of embeddings, normalisations and depthwise kernels are something else
    (`layer.weight_matrices` tells their `structure`). The model runs in inference mode, and
    nothing about it changes. Normalisation is the paper's: omega is a sum over positions and a
    mean over examples, gamma a mean over both (Grosse & Martens 2016, section 3).

    Args:
        model: A built model, instrumented or not.
        x: Inputs, in the structure that the model takes, first axis examples.
        y: Targets; needed for `fisher="empirical"`, and for losses whose Fisher matrix is
            not known without: other than cross-entropies, mean squared and squared
            logarithmic error, Poisson and Kullback-Leibler.
        loss: The loss, as `keras.Model.compile` takes it. Defaults to the
            compiled one.
        fisher: `"sampled"`, `"empirical"` or `"exact"`.
        batch_size: Number of examples to run at a time.
        seed: Seed of the sampled targets, or None for a random one.

    Returns:
        A `KroneckerFactors` for each layer path; a number is appended to paths
        that several layers have.

    Raises:
        TypeError: If `model` is not a Keras model, or `x` or `y` hold something
            else than arrays.
        ValueError: If an argument is out of range, no loss is known, `y` is
            missing where it is needed, or arrays differ in length.

    Example:

    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2, name="head")])
    >>> factors = keras_kfc.kronecker_factors(model, np.ones((8, 4)), loss="mse")
    >>> head = factors["sequential/head"]
    >>> head.omega.shape, head.gamma.shape
    ((5, 5), (2, 2))
    """
    check_choice("fisher", fisher, FISHERS)
    batch_size = check_positive_integer("batch_size", batch_size)
    seed = check_seed(seed)
    seed = random.randrange(2**31) if seed is None else seed
    if y is None and fisher == "empirical":
        raise ValueError('Argument `y` is needed for fisher="empirical". Received: y=None')
    examples = _length_of("x", x)
    if y is not None and _length_of("y", y) != examples:
        raise ValueError(
            f"Argument `y` must have as many examples as `x`, {examples}. "
            f"Received: {_length_of('y', y)}"
        )
    with temporarily_instrumented(model):
        return _factors(model, x, y, examples, _loss_of(model, loss), fisher, batch_size, seed)


def _length_of(name: str, data: Any) -> int:
    """Number of examples in a structure of arrays."""
    lengths = set()
    for part in keras.tree.flatten(data):
        if not getattr(part, "shape", None):
            raise TypeError(
                f"Argument `{name}` must be an array with examples along its first axis, or a "
                f"structure of such arrays. Received: {name}={data!r} of type "
                f"{type(data).__name__}"
            )
        lengths.add(int(part.shape[0]))
    if len(lengths) != 1 or 0 in lengths:
        raise ValueError(
            f"Arrays in argument `{name}` must be of one length, at least 1. Received: "
            f"lengths {sorted(lengths)}"
        )
    return lengths.pop()


def _loss_of(model: keras.Model, loss: Any) -> Any:
    if loss is not None:
        return compile_loss(loss, model)
    compiled = compiled_loss_of(model)
    if compiled is None:
        raise ValueError(
            "Argument `loss` is needed for a model that was not compiled with a loss. "
            "Received: loss=None"
        )
    return compiled


def _factors(
    model: keras.Model,
    x: Any,
    y: Any,
    examples: int,
    compiled: Any,
    fisher: str,
    batch_size: int,
    seed: int,
) -> dict[str, KroneckerFactors]:
    if not model.built:
        _call(model, _slice(x, 0, 1))

    noted: list[bool] = []  # one line for all batches and traces

    def batch_sums(inputs: Any, targets: Any, batch_seed: tf.Tensor) -> dict[str, list[tf.Tensor]]:
        with Capture() as capture:
            outputs = _call(model, inputs)
        size = batch_size_of(outputs)
        derivatives = output_derivatives(loss_terms(compiled, targets, outputs), fisher, batch_seed)
        if not noted:
            noted.append(derivatives.log_notes())
        layouts = {
            key: KroneckerLayout(record.linear_map, record.matrix.bias is not None)
            for key, record in capture.records.items()
            if record.matrix.structure in (None, "kronecker")
        }
        statistics = measure(capture, derivatives, ExampleSubset(size), layouts)
        sums: dict[str, list[tf.Tensor]] = {}
        for key in layouts:
            path = unused_name(capture.records[key].path, sums)
            sums[path] = [tf.cast(size, part.dtype) * part for part in statistics.moments[key]]
        return sums

    if not getattr(model, "run_eagerly", False):
        batch_sums = tf.function(batch_sums, autograph=False, reduce_retracing=True)
    totals: dict[str, list[np.ndarray]] = {}
    for start in range(0, examples, batch_size):
        stop = min(start + batch_size, examples)
        targets = None if y is None else _slice(y, start, stop)
        batch_seed = tf.constant([seed, start], tf.int64)
        for path, parts in batch_sums(_slice(x, start, stop), targets, batch_seed).items():
            share = [part.numpy().astype("float64") / examples for part in parts]
            known = totals.setdefault(path, [np.zeros_like(part) for part in share])
            totals[path] = [total + part for total, part in zip(known, share, strict=True)]
    return {
        path: KroneckerFactors(*(_squeeze(total.astype("float32")) for total in parts))
        for path, parts in totals.items()
    }


def _call(model: keras.Model, inputs: Any) -> Any:
    return model(inputs, training=False) if takes_training(model) else model(inputs)


def _slice(structure: Any, start: int, stop: int) -> Any:
    return keras.tree.map_structure(lambda part: tf.convert_to_tensor(part[start:stop]), structure)


def _squeeze(factor: np.ndarray) -> np.ndarray:
    return factor[0] if factor.shape[0] == 1 else factor
