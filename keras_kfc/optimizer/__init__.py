"""The optimizer, put together from its parts."""
