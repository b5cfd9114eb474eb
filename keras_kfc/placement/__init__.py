"""Where work runs: on one device, or on the replicas of a strategy.

Every module in this folder that registers a placement makes its strategy one that KFC trains under.
"""

import importlib
import pkgutil

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
