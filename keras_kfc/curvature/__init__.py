"""The approximate Fisher matrix, kept and inverted."""
