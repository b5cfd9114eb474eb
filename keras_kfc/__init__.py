"""Kronecker-factored natural gradient for convolutional networks in Keras."""

from keras_kfc import (
    _backend,  # noqa: F401  (first: it checks the Keras backend)
    callbacks,
    layers,
    patches,
    pictures,
)
from keras_kfc.capture import Capture
from keras_kfc.coverage_report import Coverage
from keras_kfc.curvature import KroneckerFactors, kronecker_factors
from keras_kfc.instrument import coverage, instrument, strip
from keras_kfc.models import Functional, Model, Sequential
from keras_kfc.optimizer import KFC

__version__ = "0.1.0"

__all__ = [
    "KFC",
    "Capture",
    "Coverage",
    "Functional",
    "KroneckerFactors",
    "Model",
    "Sequential",
    "callbacks",
    "coverage",
    "instrument",
    "kronecker_factors",
    "layers",
    "patches",
    "pictures",
    "strip",
]
