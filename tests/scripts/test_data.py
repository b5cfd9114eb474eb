"""Loaders of the benchmarks, on small files in the formats that the data sets come in."""

import numpy as np
import pytest
from helpers import write_idx
from scipy.io import savemat

from benchmarks import color_images
from benchmarks.tasks import DATA, NETWORKS, task_of
from examples.data import IDX_FILES, DataError, load_mnist, standardise

pytestmark = pytest.mark.slow


def cifar_records(count, seed):
    """Images, labels, and the bytes that CIFAR-10's makers define for them."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, size=(count, 32, 32, 3)).astype("uint8")
    labels = rng.integers(0, 10, size=count).astype("uint8")
    content = b""
    for image, label in zip(images, labels, strict=True):
        channels = [image[:, :, channel].tobytes() for channel in range(3)]
        content += bytes([label]) + b"".join(channels)
    return images, labels, content


@pytest.fixture
def cifar(tmp_path):
    parts = []
    for i, name in enumerate((*color_images.CIFAR_TRAIN, color_images.CIFAR_TEST)):
        images, labels, content = cifar_records(4 + i, i)
        (tmp_path / name).write_bytes(content)
        parts.append((images, labels))
    return tmp_path, parts


def test_cifar_10_is_read_from_its_binary_version(cifar):
    folder, parts = cifar
    data = color_images.load_cifar10(str(folder))
    images, labels = (np.concatenate([part[i] for part in parts[:5]]) for i in (0, 1))
    expected = standardise(images, labels, *parts[5])
    np.testing.assert_allclose(data.train_images, expected.train_images, atol=1e-5)
    np.testing.assert_array_equal(data.train_labels, expected.train_labels)
    np.testing.assert_allclose(data.test_images, expected.test_images, atol=1e-5)
    np.testing.assert_array_equal(data.test_labels, parts[5][1])
    np.testing.assert_allclose(data.train_images.mean(axis=(0, 1, 2)), 0, atol=1e-5)
    np.testing.assert_allclose(data.train_images.std(axis=(0, 1, 2)), 1, atol=1e-5)


def test_pixels_of_cifar_10_are_where_they_belong(tmp_path):
    images, labels, content = cifar_records(3, 0)
    (tmp_path / "batch.bin").write_bytes(content)
    found_images, found_labels = color_images.read_cifar(tmp_path / "batch.bin")
    np.testing.assert_array_equal(found_images, images)
    np.testing.assert_array_equal(found_labels, labels)


def write_svhn(path, images, digits):
    """Writes MATLAB's format of cropped digits, where 0 is stored as 10."""
    stored = np.where(digits == 0, 10, digits).astype("uint8")[:, None]
    savemat(path, {"X": np.moveaxis(images, 0, -1), "y": stored})


def test_svhn_is_read_from_its_mat_files(tmp_path):
    parts = []
    for name, seed in zip(color_images.SVHN_FILES, (1, 2), strict=True):
        images, _, _ = cifar_records(5, seed)
        digits = np.arange(5) * 2
        write_svhn(tmp_path / name, images, digits)
        parts.append((images, digits))
    data = color_images.load_svhn(str(tmp_path))
    expected = standardise(*parts[0], *parts[1])
    np.testing.assert_allclose(data.train_images, expected.train_images, atol=1e-5)
    np.testing.assert_allclose(data.test_images, expected.test_images, atol=1e-5)
    np.testing.assert_array_equal(data.train_labels, [0, 2, 4, 6, 8])


def test_mnist_is_read_from_its_idx_files(tmp_path):
    rng = np.random.default_rng(0)
    for name in IDX_FILES:
        shape = (5, 28, 28) if "images" in name else (5,)
        write_idx(tmp_path / name, rng.integers(0, 10, size=shape))
    data = load_mnist(str(tmp_path))
    assert data.train_images.shape == data.test_images.shape == (5, 28, 28, 1)


def no_file(folder):
    (folder / color_images.CIFAR_TRAIN[2]).unlink()


def cut_file(folder):
    path = folder / color_images.CIFAR_TRAIN[2]
    path.write_bytes(path.read_bytes()[:-1])


def high_label(folder):
    path = folder / color_images.CIFAR_TRAIN[2]
    path.write_bytes(b"\x0b" + path.read_bytes()[1:])


@pytest.mark.parametrize(
    ("damage", "says"),
    [(no_file, "is missing"), (cut_file, "records of 3,073 bytes"), (high_label, "label above 9")],
)
def test_a_broken_file_of_cifar_10_is_named(damage, says, cifar):
    folder, _ = cifar
    damage(folder)
    with pytest.raises(DataError, match=says) as caught:
        color_images.load_cifar10(str(folder))
    assert "data_batch_3.bin" in str(caught.value)


def test_a_broken_file_of_svhn_is_named(tmp_path):
    path = tmp_path / "train_32x32.mat"
    with pytest.raises(DataError, match="is missing"):
        color_images.read_svhn(path)
    path.write_bytes(b"not MATLAB's")
    with pytest.raises(DataError, match="is damaged"):
        color_images.read_svhn(path)
    savemat(path, {"X": np.zeros((32, 32, 3, 4)), "y": np.ones((3, 1))})
    with pytest.raises(DataError, match="should hold X"):
        color_images.read_svhn(path)
    savemat(path, {"X": np.zeros((32, 32, 3, 4)), "y": np.zeros((4, 1))})
    with pytest.raises(DataError, match="labels beyond"):
        color_images.read_svhn(path)


@pytest.mark.parametrize("name", ["cifar-10", "svhn", "mnist"])
def test_data_that_cannot_be_had_says_what_to_do(name, monkeypatch):
    def fail():
        raise OSError("no route to host")

    monkeypatch.setattr("keras.datasets.cifar10.load_data", fail)
    monkeypatch.setattr("keras.datasets.mnist.load_data", fail)
    with pytest.raises(DataError, match="--data-dir"):
        DATA[name](None)


@pytest.mark.parametrize("network", [n for n in NETWORKS if n not in ("conv", "conv-bn")])
def test_every_network_takes_the_images_and_starts_from_its_seed(network):
    task = task_of(f"digits/{network}", examples=8)
    first, again, other = (task.build(seed) for seed in (1, 1, 2))
    assert first(task.train_inputs).shape[0] == 8
    for a, b in zip(first.get_weights(), again.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    changed = zip(first.get_weights(), other.get_weights(), strict=True)
    assert any(np.any(a != b) for a, b in changed)
    if not task.classifies:
        assert task.train_targets.shape == first(task.train_inputs).shape
    if network == "autoencoder":
        assert task.train_targets.min() == 0 and task.train_targets.max() == 1


def test_unknown_tasks_are_refused():
    for name in ("digits", "nothing/conv", "digits/nothing"):
        with pytest.raises(ValueError, match=r"must be DATA/NETWORK.*Received"):
            task_of(name)
    with pytest.raises(ValueError, match=r"takes images of shape \(28, 28, 1\)"):
        task_of("digits/conv")


def test_what_is_held_out_of_training_takes_the_place_of_the_test_set():
    whole, part = task_of("digits/mlp"), task_of("digits/mlp", examples=50, hold_out=300)
    np.testing.assert_array_equal(part.train_inputs, whole.train_inputs[:50])
    np.testing.assert_array_equal(part.test_inputs, whole.train_inputs[-300:])
    np.testing.assert_array_equal(part.test_targets, whole.train_targets[-300:])
    # Nobody trains on what is held out.
    most = task_of("digits/mlp", hold_out=300)
    assert len(most.train_targets) == len(whole.train_targets) - 300


@pytest.mark.parametrize("count", [0, -1, 10_000])
def test_no_more_is_held_out_than_there_is(count):
    with pytest.raises(ValueError, match="hold_out"):
        task_of("digits/mlp", hold_out=count)
