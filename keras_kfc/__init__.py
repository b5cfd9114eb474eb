"""Kronecker-factored natural gradient for convolutional networks in Keras."""

# First: it checks the Keras backend.
from keras_kfc._compat import backend  # noqa: F401, I001
from keras_kfc import layers, monitor, patches
from keras_kfc.analysis.factors import KroneckerFactors, kronecker_factors
from keras_kfc.analysis.kronecker_operator import KroneckerFisherOperator
from keras_kfc.analysis.laplace import LaplacePosterior, laplace
from keras_kfc.analysis.operator import FisherOperator
from keras_kfc.layers.coverage import Coverage
from keras_kfc.layers.instrument import coverage, instrument, strip
from keras_kfc.optimizer.kfc import KFC
from keras_kfc.passes.capture import Capture

__version__ = "0.2.0"

__all__ = [
    "KFC",
    "Capture",
    "Coverage",
    "FisherOperator",
    "KroneckerFactors",
    "KroneckerFisherOperator",
    "LaplacePosterior",
    "coverage",
    "instrument",
    "kronecker_factors",
    "laplace",
    "layers",
    "monitor",
    "patches",
    "strip",
]
