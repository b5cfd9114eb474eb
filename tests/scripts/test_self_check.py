"""`python -m keras_kfc` says what there is, and finds what is broken."""

import subprocess
import sys

import keras
import numpy as np
import pytest

import keras_kfc
import keras_kfc.__main__ as self_check

pytestmark = pytest.mark.slow


def test_a_machine_that_works(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "keras_kfc"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    for text in (keras_kfc.__version__, keras.__version__, "CPU", "Everything works."):
        assert text in done.stdout
    assert "failed" not in done.stdout


def test_what_fails_is_named_and_the_rest_is_checked(monkeypatch, capsys):
    def broken():
        raise RuntimeError("no such device [/gpu]")

    monkeypatch.setattr(self_check, "CHECKS", {"first": broken, "second": lambda: "fine"})
    assert self_check.main() == 1
    printed = capsys.readouterr().out
    assert "failed: RuntimeError: no such device [/gpu]" in printed and "fine" in printed
    assert "Everything works" not in printed


def test_wrong_numbers_are_found(monkeypatch):
    """Each comparison with NumPy or between two runs fails where one side is wrong."""
    right = keras_kfc.kronecker_factors

    def wrong(*args, **kwargs):
        factors = right(*args, **kwargs)
        for each in factors.values():
            each.omega[0, 1] += 0.1 * np.abs(each.omega).max()
        return factors

    monkeypatch.setattr(keras_kfc, "kronecker_factors", wrong)
    with pytest.raises(AssertionError, match="relative error"):
        self_check.check_factors()
    monkeypatch.undo()
    assert "relative error" in self_check.check_factors()

    optimizer = keras_kfc.KFC
    monkeypatch.setattr(
        keras_kfc, "KFC", lambda *args, **kwargs: optimizer(*args, **{**kwargs, "damping": 0.5})
    )
    with pytest.raises(AssertionError, match="error"):
        self_check.check_step()
    monkeypatch.undo()
    # What is not loaded shows in the next step.
    monkeypatch.setattr(optimizer, "load_own_variables", lambda self, store: None)
    with pytest.raises(AssertionError, match="after loading, difference"):
        self_check.check_training()
