"""The examples run, and a bad data file ends them with one sentence."""

import gzip
import pathlib
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf
from helpers import write_idx

from examples import custom_loop, quickstart
from examples.comparison import Run, best
from examples.data import IDX_FILES, DataError, load_digits, load_fashion_mnist, read_idx

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture
def fashion_folder(tmp_path):
    """A small data set in the real format, whose classes differ in brightness."""
    folder = tmp_path / "fashion"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name in IDX_FILES:
        count = 40 if name.startswith("train") else 20
        labels = np.arange(count) % 10
        array = labels
        if "images" in name:
            array = rng.integers(0, 50, size=(count, 28, 28)) + 20 * labels[:, None, None]
        write_idx(folder / name, array)
    return folder


def outputs_in(tmp_path):
    return ["--output", str(tmp_path / "out"), "--saved-models", str(tmp_path / "saved")]


def test_quickstart_runs_as_a_script_from_anywhere(tmp_path):
    script = str(ROOT / "examples" / "quickstart.py")
    done = subprocess.run(
        [sys.executable, script, "--quick", *outputs_in(tmp_path)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for text in ("KFC()", "SGD(3.0, momentum=0.9)", "Adam(0.005)", "held-out loss"):
        assert text in done.stdout
    assert (tmp_path / "out" / "digits-quick.png").read_bytes().startswith(b"\x89PNG")
    served = tf.saved_model.load(str(tmp_path / "saved" / "digits-quick"))
    digits = quickstart.autoencoder(load_digits()).test[0]
    error = np.mean(np.square(served.serve(digits).numpy() - digits))
    assert f"loaded again: held-out loss {error:.3g}" in done.stdout


def test_quickstart_shows_what_it_says():
    """A third of the iterations at most, and no worse on digits that nobody trained on."""
    options = quickstart.parse([])
    ours, *baselines = quickstart.train_all(quickstart.autoencoder(load_digits()), options)
    assert ours.reached and len(baselines) == 2
    for other in baselines:
        assert 3 * ours.iterations[-1] < other.iterations[-1]
        assert ours.test_loss < 1.02 * other.test_loss
        # A baseline that does not train would lose as well.
        assert other.final_loss < 0.01


@pytest.mark.nightly
def test_quickstart_on_idx_files(tmp_path, fashion_folder, capsys):
    arguments = ["--quick", "--dataset", "fashion-mnist", "--data-dir", str(fashion_folder)]
    assert quickstart.main(arguments + outputs_in(tmp_path)) == 0
    assert "SavedModel" in capsys.readouterr().out
    assert (tmp_path / "out" / "fashion-mnist-quick.png").is_file()


def damage_nothing(path):
    path.unlink()


def damage_gzip(path):
    path.write_bytes(b"not gzip")


def cut_gzip(path):
    path.write_bytes(path.read_bytes()[:-20])


def cut_data(path):
    content = gzip.decompress(path.read_bytes())
    path.write_bytes(gzip.compress(content[:-5]))


def cut_header(path):
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[:6]))


def other_type(path):
    write_idx(path, np.zeros((3, 3)), kind=0x0D)


def other_count(path):
    write_idx(path, np.zeros(7))


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (damage_nothing, "is missing"),
        (damage_gzip, "is damaged"),
        (cut_gzip, "is damaged"),
        (cut_data, "should hold"),
        (cut_header, "cut short"),
        (other_type, "not an IDX file of bytes"),
        (other_count, "labels"),
    ],
)
def test_a_broken_file_gives_one_sentence_that_names_it(
    damage, says, tmp_path, fashion_folder, capsys
):
    broken = fashion_folder / "train-labels-idx1-ubyte.gz"
    damage(broken)
    arguments = ["--quick", "--dataset", "fashion-mnist", "--data-dir", str(fashion_folder)]
    assert quickstart.main(arguments + outputs_in(tmp_path)) == 1
    message = capsys.readouterr().err.strip()
    assert str(broken) in message and says in message and "dataset-fashion-mnist" in message
    assert "\n" not in message and message.endswith(".")


def test_missing_folder_and_missing_network_name_the_way_out(tmp_path, monkeypatch, capsys):
    shutil.rmtree(tmp_path / "nothing", ignore_errors=True)
    arguments = ["--quick", "--dataset", "fashion-mnist"]
    assert quickstart.main([*arguments, "--data-dir", str(tmp_path / "nothing")]) == 1
    assert "is missing" in capsys.readouterr().err

    def fail():
        raise OSError("no route to host")

    monkeypatch.setattr("keras.datasets.fashion_mnist.load_data", fail)
    assert quickstart.main(arguments) == 1
    message = capsys.readouterr().err
    assert "--data-dir" in message and "no route to host" in message


@pytest.mark.parametrize("arguments", [["--epochs", "0"], ["--dataset", "cifar"], ["--seed", "x"]])
def test_bad_options_are_refused(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        quickstart.main(arguments)
    assert stopped.value.code == 2
    assert arguments[0] in capsys.readouterr().err


def test_idx_files_are_read_as_written(tmp_path):
    array = np.random.default_rng(0).integers(0, 256, size=(5, 4, 3)).astype("uint8")
    write_idx(tmp_path / "data.gz", array)
    np.testing.assert_array_equal(read_idx(tmp_path / "data.gz"), array)


def test_data_sets_are_standardised_and_split(fashion_folder):
    for data in (load_digits(), load_fashion_mnist(str(fashion_folder))):
        assert data.train_images.dtype == np.float32 and data.train_images.shape[-1] == 1
        assert abs(data.train_images.mean()) < 1e-3 and abs(data.train_images.std() - 1) < 1e-3
        assert len(data.train_images) == len(data.train_labels)
        assert len(data.test_images) == len(data.test_labels)
    digits = load_digits()
    assert len(digits.train_labels) + len(digits.test_labels) == 1797
    assert not {image.tobytes() for image in digits.train_images} & {
        image.tobytes() for image in digits.test_images
    }


def test_missing_data_is_an_error_of_its_own():
    with pytest.raises(DataError, match="is missing"):
        load_fashion_mnist("does-not-exist")


def test_diverged_runs_are_never_the_best():
    diverged = Run("SGD(1)", None, iterations=[3], losses=[float("nan")])
    fine = Run("SGD(0.1)", None, iterations=[9], losses=[0.5])
    assert best([diverged, fine]) is fine
    done = Run("SGD(0.2)", None, iterations=[9], losses=[0.6], reached=True)
    sooner = Run("SGD(0.3)", None, iterations=[8], losses=[0.6], reached=True)
    assert best([diverged, fine, done, sooner]) is sooner


def test_custom_loop_refuses_no_epochs(capsys):
    with pytest.raises(SystemExit):
        custom_loop.main(["--epochs", "0"])
    assert "--epochs" in capsys.readouterr().err


def test_custom_loop_learns(capsys):
    assert custom_loop.main(["--epochs", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    losses = [float(line.split()[-1]) for line in lines if line.startswith("epoch")]
    assert len(losses) == 2 and losses[1] < 0.5 * losses[0]


@pytest.mark.nightly
def test_several_workers_have_equal_weights(tmp_path):
    script = str(ROOT / "examples" / "several_workers.py")
    # Enough steps for rounding to show, in graphs that are optimised as a user's are.
    sizes = ["--epochs", "2", "--steps", "8", "--output", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, script, *sizes], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "the same weights, to the bit" in done.stdout
    assert (tmp_path / "several-workers.png").read_bytes().startswith(b"\x89PNG")
    digests = re.findall(r"│ [01] +│ (\w{10}) │ (\w{10}) │", done.stdout)
    assert len(digests) == 2 and digests[0] == digests[1] and digests[0][0] != digests[0][1]
