"""The approximate Fisher matrix, kept and inverted.

Every module in this folder that registers a structure makes it a choice of `KFC(structure=...)`.
"""

import importlib
import pkgutil

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
