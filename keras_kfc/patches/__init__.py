"""Second moments of the patches that a convolution sees, without the patches."""

from keras_kfc.patches.moment import patch_second_moment

__all__ = ["patch_second_moment"]
