"""What is recorded and measured in a training pass."""
