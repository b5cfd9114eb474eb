"""Ground floor: checks of arguments, and texts."""
