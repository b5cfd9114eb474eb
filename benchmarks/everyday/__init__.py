"""Does whatever trains with Adam train with KFC()? Small tasks of many kinds and batch sizes.

`python -m benchmarks.everyday` trains each with `KFC()` at its defaults and with Adam, AdamW
and SGD at the best of four learning rates each, the same number of steps, and prints how the
losses at the end compare.
"""

from benchmarks.everyday import classification, own_steps, pictures, regression, sequences
from benchmarks.everyday.task import TASKS

__all__ = ["TASKS", "classification", "own_steps", "pictures", "regression", "sequences"]
