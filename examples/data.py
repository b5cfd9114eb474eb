"""Image data sets for the examples: loaded, checked, standardised."""

import dataclasses
import gzip
import pathlib
import struct

import numpy as np

# MNIST and Fashion-MNIST have the same format and file names.
IDX_FILES = (
    "train-images-idx3-ubyte.gz",
    "train-labels-idx1-ubyte.gz",
    "t10k-images-idx3-ubyte.gz",
    "t10k-labels-idx1-ubyte.gz",
)

_ADVICE = "get a fresh copy (Fashion-MNIST: for example Debian's package dataset-fashion-mnist)"


class DataError(Exception):
    """A data file is missing or broken; the message says which and what to do."""


@dataclasses.dataclass
class ImageData:
    """Images and labels, split into training and test set.

    Attributes:
        train_images: `(N, H, W, C)` float32, standardised with the training set's moments.
        train_labels: `(N,)` int64.
        test_images: As `train_images`.
        test_labels: As `train_labels`.
    """

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray

    def first(self, count: int) -> "ImageData":
        """The same test set with only the first `count` training images."""
        return dataclasses.replace(
            self,
            train_images=self.train_images[:count],
            train_labels=self.train_labels[:count],
        )

    def holding_out(self, count: int) -> "ImageData":
        """The last `count` training images as the test set, to choose settings by."""
        return ImageData(
            self.train_images[:-count],
            self.train_labels[:-count],
            self.train_images[-count:],
            self.train_labels[-count:],
        )


def load(dataset: str, data_dir: str | None = None) -> ImageData:
    """Loads `"digits"` or `"fashion-mnist"`, see the functions below."""
    return load_digits() if dataset == "digits" else load_fashion_mnist(data_dir)


def load_digits() -> ImageData:
    """The 1,797 handwritten digits of 8x8 pixels that scikit-learn ships.

    Every fifth digit is held out.
    """
    from sklearn.datasets import load_digits as sklearn_digits

    images, labels = sklearn_digits(return_X_y=True)
    images = images.reshape(-1, 8, 8, 1)
    held_out = np.arange(len(images)) % 5 == 4
    return standardise(images[~held_out], labels[~held_out], images[held_out], labels[held_out])


def load_fashion_mnist(data_dir: str | None = None) -> ImageData:
    """Fashion-MNIST: 60,000 training and 10,000 test images of 28x28 pixels.

    Args:
        data_dir: Folder that holds the four IDX `.gz` files, or None to let
            `keras.datasets` download them.

    Raises:
        DataError: If a file is missing or broken, or the download fails.
    """
    return _load_idx("Fashion-MNIST", "fashion_mnist", data_dir)


def load_mnist(data_dir: str | None = None) -> ImageData:
    """MNIST: 60,000 training and 10,000 test images of handwritten digits of 28x28 pixels.

    Args:
        data_dir: As for `load_fashion_mnist`.

    Raises:
        DataError: If a file is missing or broken, or the download fails.
    """
    return _load_idx("MNIST", "mnist", data_dir)


def _load_idx(name: str, keras_name: str, data_dir: str | None) -> ImageData:
    if data_dir is not None:
        folder = pathlib.Path(data_dir)
        arrays = [read_idx(folder / file) for file in IDX_FILES]
        for i in (0, 2):
            if len(arrays[i]) != len(arrays[i + 1]) or arrays[i].shape[1:] != (28, 28):
                raise DataError(
                    f"The files {folder / IDX_FILES[i]} and {folder / IDX_FILES[i + 1]} "
                    f"should hold images of 28x28 pixels and as many labels but hold arrays of "
                    f"shape {arrays[i].shape} and {arrays[i + 1].shape}: {_ADVICE}."
                )
        train_images, train_labels, test_images, test_labels = arrays
    else:
        import keras

        try:
            (train_images, train_labels), (test_images, test_labels) = getattr(
                keras.datasets, keras_name
            ).load_data()
        except Exception as error:  # whatever a failed download raises
            raise DataError(
                f"{name} could not be downloaded: connect to the internet, or pass "
                f"--data-dir with a folder that holds {', '.join(IDX_FILES)} ({error})."
            ) from error
    return standardise(train_images[..., None], train_labels, test_images[..., None], test_labels)


def read_idx(path: pathlib.Path) -> np.ndarray:
    """Reads one gzipped IDX file of unsigned bytes.

    Args:
        path: The file.

    Returns:
        An array of uint8.

    Raises:
        DataError: If the file is missing, damaged, or of another format.
    """
    if not path.is_file():
        raise DataError(f"The file {path} is missing: {_ADVICE}, or mend --data-dir.")
    try:
        with gzip.open(path) as stream:
            content = stream.read()
    except (OSError, EOFError) as error:
        raise DataError(f"The file {path} is damaged ({error}): {_ADVICE}.") from error
    if len(content) < 4 or content[:3] != b"\x00\x00\x08":
        raise DataError(f"The file {path} is not an IDX file of bytes: {_ADVICE}.")
    rank = content[3]
    header = 4 + 4 * rank
    if len(content) < header:
        raise DataError(f"The file {path} is cut short: {_ADVICE}.")
    shape = struct.unpack(f">{rank}I", content[4:header])
    if len(content) - header != int(np.prod(shape)):
        raise DataError(
            f"The file {path} should hold {int(np.prod(shape)):,} bytes of data but holds "
            f"{len(content) - header:,}: {_ADVICE}."
        )
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def standardise(train_images, train_labels, test_images, test_labels) -> ImageData:
    """Images with zero mean and unit variance in each channel, by the training set's moments.

    Args:
        train_images: `(N, H, W, C)`.
        train_labels: `(N,)`.
        test_images: As `train_images`.
        test_labels: As `train_labels`.

    Returns:
        The data set.
    """
    train = train_images.astype("float32")
    mean = train.mean(axis=(0, 1, 2), dtype="float64").astype("float32")
    train -= mean
    variance = np.mean(np.square(train), axis=(0, 1, 2), dtype="float64")
    deviation = np.sqrt(variance).astype("float32")
    return ImageData(
        train / deviation,
        train_labels.astype("int64"),
        (test_images.astype("float32") - mean) / deviation,
        test_labels.astype("int64"),
    )
