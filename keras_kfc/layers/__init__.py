"""Layers of Keras that `keras_kfc.KFC` preconditions.

Every module in this folder that registers a class adds it here under its own name.
"""

import importlib
import pkgutil

from keras_kfc.layers.conv import Conv2D
from keras_kfc.layers.dense import Dense
from keras_kfc.layers.instrumented import CAPTURING_CLASSES

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
globals().update({kind.__name__: kind for kind in CAPTURING_CLASSES.values()})

__all__ = ["Conv2D", "Dense"]
__all__ += sorted({kind.__name__ for kind in CAPTURING_CLASSES.values()} - set(__all__))
