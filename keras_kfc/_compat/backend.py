"""Refuses to import under another Keras backend than TensorFlow."""

import os


def _require_tensorflow(backend: str) -> None:
    if backend != "tensorflow":
        raise ImportError(
            "keras_kfc needs Keras to run on the TensorFlow backend. Received: "
            f'backend="{backend}". Set the environment variable '
            'KERAS_BACKEND to "tensorflow" (or edit "backend" in ~/.keras/keras.json) '
            "before the first import of keras."
        )


# Before Keras itself fails, where that backend is not installed.
_require_tensorflow(os.environ.get("KERAS_BACKEND") or "tensorflow")

import keras  # noqa: E402

_require_tensorflow(keras.backend.backend())
