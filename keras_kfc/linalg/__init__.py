"""Damped inverses of symmetric matrices."""
