"""How far to go: rules of the step size, and what the losses so far tell."""
