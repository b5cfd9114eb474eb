"""Measurements, each run as `python -m benchmarks.NAME`."""

import os

# Before TensorFlow is imported: its log would stand between the lines of a progress bar.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
