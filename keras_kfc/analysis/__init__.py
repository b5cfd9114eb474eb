"""Looking at curvature without training."""
