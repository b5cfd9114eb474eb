"""The second moment of patches from the definition, by loops."""

import numpy as np

from conftest import naive_patches


def normal(*shape, seed=0, dtype="float64"):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def naive_moment(images, kernel, strides, padding, dilation, channels=slice(None)):
    """Sums of `p pᵀ` and `p` by explicit loops over examples and positions."""
    rows = [
        patch
        for image in images
        for patch in naive_patches(image, kernel, strides, padding, dilation, channels)
    ]
    return sum(np.outer(row, row) for row in rows), sum(rows)
