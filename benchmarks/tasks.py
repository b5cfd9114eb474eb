"""The training problems of the measurements: a data set and a network for it.

A task is named `DATA/NETWORK`, for example `fashion-mnist/conv`.
"""

import dataclasses
from collections.abc import Callable, Mapping

import keras
import numpy as np

from benchmarks import nets
from benchmarks.color_images import load_cifar10, load_svhn
from examples.data import ImageData, load_digits, load_fashion_mnist, load_mnist
from examples.nets import digits_net, fashion_net

CROSSENTROPY = "sparse_categorical_crossentropy"


@dataclasses.dataclass(frozen=True)
class Task:
    """A training problem.

    Args:
        name: `DATA/NETWORK`.
        build: Makes the model, not compiled; takes the seed of its initial weights.
        loss: Its Keras loss.
        train_inputs: Inputs of the training set.
        train_targets: Their targets.
        test_inputs: Inputs of the test set.
        test_targets: Their targets.
    """

    name: str
    build: Callable[[int], keras.Model]
    loss: str
    train_inputs: np.ndarray
    train_targets: np.ndarray
    test_inputs: np.ndarray
    test_targets: np.ndarray

    @property
    def classifies(self) -> bool:
        """Whether outputs are probabilities of classes, so that there is an accuracy."""
        return self.loss == CROSSENTROPY


# Loaders take a folder, or None for a download by Keras where there is one.
DATA: Mapping[str, Callable[[str | None], ImageData]] = {
    "digits": lambda data_dir: load_digits(),
    "fashion-mnist": load_fashion_mnist,
    "mnist": load_mnist,
    "cifar-10": load_cifar10,
    "svhn": load_svhn,
}
_CLASSIFIERS: Mapping[str, Callable[[tuple[int, ...], int], keras.Model]] = {
    "digits": lambda shape, seed: digits_net(seed),
    "conv": lambda shape, seed: fashion_net(seed),
    "conv-bn": lambda shape, seed: fashion_net(seed, batch_norm=True),
    "mlp": lambda shape, seed: nets.mlp(shape, seed=seed),
    "cuda-convnet": lambda shape, seed: nets.cuda_convnet(shape, seed=seed),
    "cuda-convnet-bn": lambda shape, seed: nets.cuda_convnet(shape, seed=seed, batch_norm=True),
    "resnet-20": lambda shape, seed: nets.resnet20(shape, seed=seed),
}
NETWORKS = (*_CLASSIFIERS, "autoencoder", "small-autoencoder")
# Networks for images of one size only.
_SIZES = {"digits": (8, 8, 1), "conv": (28, 28, 1), "conv-bn": (28, 28, 1)}


def task_of(
    name: str,
    data_dir: str | None = None,
    examples: int | None = None,
    hold_out: int | None = None,
) -> Task:
    """Loads a task.

    Args:
        name: `DATA/NETWORK`, of the keys of `DATA` and of `NETWORKS`.
        data_dir: Folder of the data's files, or None for a download.
        examples: Number of training examples to keep, or None for all.
        hold_out: So many training examples, the last ones, take the place of the test set;
            None to test on the test set.

    Returns:
        The task.

    Raises:
        ValueError: If the name is not known, the network does not take the images, or
            `hold_out` would leave nothing to train on or to test on.
        DataError: If data is missing or broken.
    """
    data_name, _, network = name.partition("/")
    if data_name not in DATA or network not in NETWORKS:
        raise ValueError(
            f"Argument `name` must be DATA/NETWORK with DATA one of {', '.join(DATA)} and "
            f"NETWORK one of {', '.join(NETWORKS)}. Received: name={name}"
        )
    data = DATA[data_name](data_dir)
    if hold_out is not None:
        if not 0 < hold_out < len(data.train_images):
            raise ValueError(
                "Argument `hold_out` must be at least 1, and less than the number of training "
                f"examples, {len(data.train_images)}. Received: hold_out={hold_out}"
            )
        data = data.holding_out(hold_out)
    if examples is not None:
        data = data.first(examples)
    shape = data.train_images.shape[1:]
    if shape != _SIZES.get(network, shape):
        raise ValueError(
            f"Network {network} takes images of shape {_SIZES[network]}. "
            f"Received: name={name}, with images of shape {shape}"
        )
    if network in _CLASSIFIERS:
        return Task(
            name,
            lambda seed: _CLASSIFIERS[network](shape, seed),
            CROSSENTROPY,
            data.train_images,
            data.train_labels,
            data.test_images,
            data.test_labels,
        )
    train, test = (x.reshape(len(x), -1) for x in (data.train_images, data.test_images))
    if network == "small-autoencoder":
        build, loss = nets.small_autoencoder, "mean_squared_error"
    else:
        # Pixels between 0 and 1 are read as probabilities.
        low, high = train.min(), train.max()
        train, test = ((x - low) / (high - low) for x in (train, test))
        build, loss = nets.autoencoder, "binary_crossentropy"
    return Task(
        name, lambda seed: build(train.shape[1:], seed=seed), loss, train, train, test, test
    )
