"""The example on uncertainty runs, and its figures are what they are called."""

import numpy as np
import pytest

from examples import uncertainty


def test_calibration_error_is_the_distance_of_confidence_from_accuracy():
    labels = np.array([0] * 8 + [1] * 2)
    sure = np.tile([0.95, 0.05], (10, 1))
    assert uncertainty.calibration_error(sure, labels) == pytest.approx(0.15)
    right = np.tile([0.8, 0.2], (10, 1))
    assert uncertainty.calibration_error(right, labels) == pytest.approx(0.0, abs=1e-12)


def test_told_apart_is_the_area_under_the_curve():
    inside, outside = np.array([[0.9], [0.6]]), np.array([[0.5], [0.7], [0.2]])
    # Of six pairs five are in order.
    assert uncertainty.told_apart(inside, outside) == pytest.approx(5 / 6)


@pytest.mark.nightly
def test_it_runs(tmp_path, capsys):
    assert uncertainty.main(["--quick", "--output", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    for text in ("point estimate", "posterior, last layer", "posterior, all layers"):
        assert text in shown
    assert (tmp_path / "uncertainty-digits-quick.png").read_bytes().startswith(b"\x89PNG")
    missing = ["--dataset", "fashion-mnist", "--data-dir", str(tmp_path)]
    assert uncertainty.main(missing) == 1
