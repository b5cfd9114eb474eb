"""CIFAR-10 and SVHN, from the files that their makers publish."""

import pathlib

import numpy as np

from examples.data import DataError, ImageData, standardise

CIFAR_TRAIN = tuple(f"data_batch_{i}.bin" for i in range(1, 6))
CIFAR_TEST = "test_batch.bin"
SVHN_FILES = ("train_32x32.mat", "test_32x32.mat")
# One byte for the label, then 32x32 pixels of red, of green and of blue.
_CIFAR_RECORD = 1 + 3 * 32 * 32


def load_cifar10(data_dir: str | None = None) -> ImageData:
    """CIFAR-10: 50,000 training and 10,000 test images of 32x32 pixels with three channels.

    Args:
        data_dir: Folder that holds the six files of the binary version, or None to let
            `keras.datasets` download the other one.

    Raises:
        DataError: If a file is missing or broken, or the download fails.
    """
    if data_dir is None:
        import keras

        try:
            (train_images, train_labels), (test_images, test_labels) = (
                keras.datasets.cifar10.load_data()
            )
        except Exception as error:  # whatever a failed download raises
            raise DataError(
                "CIFAR-10 could not be downloaded: connect to the internet, or pass --data-dir "
                f"with a folder that holds the binary version, {CIFAR_TEST} and so on ({error})."
            ) from error
        return standardise(train_images, train_labels[:, 0], test_images, test_labels[:, 0])
    folder = pathlib.Path(data_dir)
    parts = [read_cifar(folder / name) for name in CIFAR_TRAIN]
    train_images, train_labels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return standardise(train_images, train_labels, *read_cifar(folder / CIFAR_TEST))


def read_cifar(path: pathlib.Path) -> tuple[np.ndarray, np.ndarray]:
    """Reads one file of CIFAR-10's binary version.

    Args:
        path: The file.

    Returns:
        Images `(N, 32, 32, 3)` and labels `(N,)`, both uint8.

    Raises:
        DataError: If the file is missing or of another format.
    """
    if not path.is_file():
        raise DataError(f"The file {path} of CIFAR-10's binary version is missing.")
    content = np.fromfile(path, np.uint8)
    if not len(content) or len(content) % _CIFAR_RECORD:
        raise DataError(
            f"The file {path} should hold records of {_CIFAR_RECORD:,} bytes but holds "
            f"{len(content):,} bytes: get CIFAR-10's binary version."
        )
    records = content.reshape(-1, _CIFAR_RECORD)
    labels = records[:, 0]
    if labels.max() > 9:
        raise DataError(f"The file {path} holds a label above 9: it is not one of CIFAR-10.")
    return records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), labels


def load_svhn(data_dir: str | None = None) -> ImageData:
    """SVHN's cropped digits: 73,257 training and 26,032 test images of 32x32x3.

    Args:
        data_dir: Folder that holds `train_32x32.mat` and `test_32x32.mat`.

    Raises:
        DataError: If no folder is given, or a file is missing or broken.
    """
    if data_dir is None:
        raise DataError(
            f"SVHN is read from files: pass --data-dir with a folder that holds "
            f"{' and '.join(SVHN_FILES)}, the format of cropped digits."
        )
    folder = pathlib.Path(data_dir)
    train, test = (read_svhn(folder / name) for name in SVHN_FILES)
    return standardise(*train, *test)


def read_svhn(path: pathlib.Path) -> tuple[np.ndarray, np.ndarray]:
    """Reads one MATLAB file of SVHN's cropped digits.

    Args:
        path: The file, with the variables `X` of shape (32, 32, 3, N) and `y` of shape
            (N, 1), where the digit 0 has the label 10.

    Returns:
        Images `(N, 32, 32, 3)` and labels `(N,)` from 0 to 9, both uint8.

    Raises:
        DataError: If the file is missing, damaged or of another format.
    """
    from scipy.io import loadmat

    if not path.is_file():
        raise DataError(f"The file {path} of SVHN is missing.")
    try:
        content = loadmat(path, variable_names=("X", "y"))
    except Exception as error:  # of many types, for files that are not MATLAB's
        raise DataError(f"The file {path} is damaged ({error}).") from error
    images, labels = content.get("X"), content.get("y")
    if images is None or labels is None or images.shape != (32, 32, 3, labels.size):
        raise DataError(
            f"The file {path} should hold X of shape (32, 32, 3, N) and N labels y, as SVHN's "
            "cropped digits do."
        )
    labels = labels.ravel()
    if labels.min() < 1 or labels.max() > 10:
        raise DataError(f"The file {path} holds labels beyond 1 to 10: it is not one of SVHN.")
    return np.moveaxis(images, -1, 0), (labels % 10).astype("uint8")
