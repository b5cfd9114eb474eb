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
def _fresh_names_and_seed(doctest_namespace):
    """Every test starts with fresh Keras names and one seed; what docstring examples may use."""
    # Without its garbage collection, which takes seconds late in the suite.
    keras.backend.clear_session(free_memory=False)
    keras.utils.set_random_seed(7)
    doctest_namespace.update(keras=keras, keras_kfc=keras_kfc, np=np, tf=tf)
