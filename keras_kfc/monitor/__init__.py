"""Watching a training; reads, never writes."""

from keras_kfc.monitor.callbacks import CurvatureMonitor, FactorPictures
from keras_kfc.monitor.pictures import draw_factors

__all__ = ["CurvatureMonitor", "FactorPictures", "draw_factors"]
