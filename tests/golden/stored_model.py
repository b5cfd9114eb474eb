"""A model file of each format version, which must load for ever, and how its training goes on.

`python tests/golden/stored_model.py` writes the files of the version of now; with `--weights` only
how training goes on, of all versions, for when a step has changed.
"""

import pathlib
import sys

import keras
import numpy as np

FOLDER = pathlib.Path(__file__).parent
sys.path.insert(0, str(FOLDER.parent))

import resuming  # noqa: E402

from keras_kfc.optimizer.archive import FORMAT_VERSION  # noqa: E402


def main():
    """Stores a model after two epochs, and its weights after two more."""
    paths = sorted(FOLDER.glob("format-*.keras"))
    if "--weights" not in sys.argv:
        paths = [FOLDER / f"format-{FORMAT_VERSION}.keras"]
        model = resuming.compiled()
        resuming.fit(model, epochs=2)
        model.save(paths[0])
    for path in paths:
        model = keras.models.load_model(path)
        resuming.fit(model, epochs=4, first=2)
        weights = {str(i): w for i, w in enumerate(model.get_weights())}
        np.savez_compressed(path.with_suffix(".npz"), **weights)


if __name__ == "__main__":
    main()
