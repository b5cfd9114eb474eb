"""Settings for all tests, and the names that docstring examples may use."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("MPLBACKEND", "Agg")

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_kfc


@pytest.fixture(autouse=True)
def _doctest_names(doctest_namespace):
    """Names that every docstring example may use, with fresh Keras names and seeds."""
    keras.backend.clear_session()
    keras.utils.set_random_seed(7)
    doctest_namespace.update(keras=keras, keras_kfc=keras_kfc, np=np, tf=tf)
