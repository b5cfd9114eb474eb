"""What a loss tells of its Fisher matrix, a family at a time.

Every module in this folder that registers a loss function makes it known.
"""

import importlib
import pkgutil

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
