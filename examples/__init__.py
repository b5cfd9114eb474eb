"""Runnable examples, and the data sets they load."""
