"""Kronecker factors of a model on given data, without training."""

import dataclasses
from typing import Any

import keras
import numpy as np

from keras_kfc.analysis.batches import Batches, drawn_seed
from keras_kfc.analysis.moments import mean_moments
from keras_kfc.curvature.layout import KroneckerLayout
from keras_kfc.layers.instrument import temporarily_instrumented
from keras_kfc.losses.derivatives import FISHERS
from keras_kfc.passes.records import LayerRecord
from keras_kfc.utils.arguments import check_choice
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
    nothing about it changes. They are the paper's, as KFC keeps them with
    `weight_sharing="expand"`: omega is a sum over positions and a mean over examples, gamma a mean
    over both (Grosse & Martens 2016, section 3).

    Args:
        model: A built model, instrumented or not.
        x: Inputs, in the structure that the model takes, first axis examples.
        y: Targets; needed for `fisher="empirical"`, and for losses whose Fisher matrix is
            not known without: other than cross-entropies, mean squared and squared
            logarithmic error, Poisson and Kullback-Leibler.
        loss: The loss, as `keras.Model.compile` takes it. Defaults to the
            compiled one.
        fisher: `"sampled"`, `"empirical"`, `"exact"` or `"curvature_propagation"`, as in
            `keras_kfc.KFC`.
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
    seed = drawn_seed(seed)
    if y is None and fisher == "empirical":
        raise ValueError('Argument `y` is needed for fisher="empirical". Received: y=None')
    with temporarily_instrumented(model):
        measured = mean_moments(Batches(model, x, y, loss, batch_size), fisher, seed, _layout_for)
    factors: dict[str, KroneckerFactors] = {}
    for part in measured:
        path = unused_name(part.path, factors)
        factors[path] = KroneckerFactors(*(_squeeze(m.astype("float32")) for m in part.moments))
    return factors


def _layout_for(record: LayerRecord) -> KroneckerLayout | None:
    if record.matrix.structure not in (None, "kronecker"):
        return None
    return KroneckerLayout(record.linear_map, record.matrix.bias is not None)


def _squeeze(factor: np.ndarray) -> np.ndarray:
    return factor[0] if factor.shape[0] == 1 else factor
