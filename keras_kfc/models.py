"""Keras's model classes under this package's name, for models built from scratch.

They are Keras's own: what feeds the optimizer hangs on the layers and on the
compiled loss, so every Keras model gets it, and a model saved from here loads
with nothing but its layers registered.
"""

import keras
from keras.src.models.functional import Functional

Model = keras.Model
Sequential = keras.Sequential

__all__ = ["Functional", "Model", "Sequential"]
