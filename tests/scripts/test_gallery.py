"""The examples of the gallery and of the settings run, and draw."""

import importlib
import types

import numpy as np
import pytest
from helpers import few

from examples import knobs, segmentation
from examples.gallery import parse

pytestmark = pytest.mark.slow

GALLERY = (
    "image_classifier",
    "segmentation",
    "vision_transformer",
    "transfer_learning",
    "variational_autoencoder",
)


@pytest.mark.parametrize("name", few(GALLERY, 2))
def test_an_example_runs(name, tmp_path, capsys):
    example = importlib.import_module(f"examples.{name}")
    assert example.main(["--quick", "--output", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "KFC(" in printed and "Adam(" in printed and "nan" not in printed
    picture = tmp_path / f"{name.replace('_', '-')}-quick.png"
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_settings_are_drawn(tmp_path, capsys):
    assert knobs.main(["--quick", "--output", str(tmp_path)]) == 0
    assert "damping=0.001: loss" in capsys.readouterr().out
    assert (tmp_path / "knob-damping-quick.png").is_file()


def test_a_missing_file_gives_one_sentence(tmp_path, capsys):
    arguments = ["--quick", "--dataset", "fashion-mnist", "--data-dir", str(tmp_path)]
    assert knobs.main(arguments) == 1
    assert "is missing" in capsys.readouterr().err


def test_masks_are_where_digits_are(monkeypatch):
    """Without digits, the same seed draws the same pieces of photographs."""
    images, masks = segmentation.scenes(8, seed=3)
    monkeypatch.setattr(
        "sklearn.datasets.load_digits",
        lambda: types.SimpleNamespace(images=np.zeros((1797, 8, 8))),
    )
    plain, empty = segmentation.scenes(8, seed=3)
    assert not empty.any()
    changed = (images != plain).any(axis=-1, keepdims=True)
    assert changed[masks > 0].mean() > 0.99
    # The faint rim of a digit is not in its mask.
    assert changed[masks == 0].mean() < 0.3
    assert images.shape == (8, 32, 32, 3) and set(np.unique(masks)) == {0.0, 1.0}
    assert images.min() >= 0 and images.max() <= 1
    assert (masks.mean(axis=(1, 2, 3)) > 0.02).all() and (masks.mean(axis=(1, 2, 3)) < 0.5).all()


@pytest.mark.parametrize("epochs", ["0", "-1", "many"])
def test_a_number_of_epochs_is_positive(epochs, capsys):
    with pytest.raises(SystemExit):
        parse("Says what.", ["--epochs", epochs], epochs=5, name="p")
    assert "expected a positive integer" in capsys.readouterr().err


def test_a_short_run_does_not_overwrite_a_real_ones_picture(tmp_path):
    pictures = [
        parse("Says what.", ["--output", str(tmp_path), *quick], epochs=5, name="p").picture
        for quick in ([], ["--quick"])
    ]
    assert pictures[0] == tmp_path / "p.png" and pictures[1] != pictures[0]
