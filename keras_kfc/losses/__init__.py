"""What a loss tells of its Fisher matrix, a family at a time."""
