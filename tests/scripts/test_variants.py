"""The benchmark of variants: its summary by hand, and a short run."""

import json

import pytest

from benchmarks import variants


def test_the_summary_compares_at_the_seconds_of_the_default():
    default = [(1.0, 0.5), (2.0, 0.4)]
    slower = [(1.5, 0.3), (3.0, 0.1)]
    rows = variants.summary({"KFC()": [default], "other": [slower]})
    assert [row["variant"] for row in rows] == ["KFC()", "other"]
    assert rows[0]["loss"] == pytest.approx(0.4) == rows[0]["loss at equal seconds"]
    assert rows[1]["loss"] == pytest.approx(0.1)
    assert rows[1]["loss at equal seconds"] == pytest.approx(0.3)
    assert rows[1]["seconds"] == pytest.approx(3.0)


@pytest.mark.nightly
def test_it_runs(tmp_path, capsys):
    path = tmp_path / "variants.json"
    arguments = ["--tasks", "conv net, batch 256", "--seeds", "0", "--iterations", "20"]
    names = ["--variants", "KFC()", "KFC(step='quadratic', structure='eigenbasis')"]
    variants.main([*arguments, *names, "--output", str(path)])
    rows = json.loads(path.read_text())["tasks"]["conv net, batch 256"]["rows"]
    assert len(rows) == 2 and all(0 < row["loss"] < 2.5 for row in rows)
    assert "equal seconds" in capsys.readouterr().out
