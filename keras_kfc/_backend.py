"""Refuses to import under another Keras backend than TensorFlow."""

import keras

if keras.backend.backend() != "tensorflow":
    raise ImportError(
        "keras_kfc needs Keras to run on the TensorFlow backend. Received: "
        f'backend="{keras.backend.backend()}". Set the environment variable '
        'KERAS_BACKEND to "tensorflow" (or edit "backend" in ~/.keras/keras.json) '
        "before the first import of keras."
    )
