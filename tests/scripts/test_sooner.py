"""The benchmark of seconds to a baseline's loss: how it searches."""

import pytest

from benchmarks import sooner
from benchmarks.families import Run


def run_of(iterations: int, seconds: float = 0.1) -> Run:
    """A training whose loss falls as one over its length, after two seconds of start-up."""
    return Run("KFC", iterations, 2 + seconds * iterations, 2.0, 30 / iterations, 0.0, 0.0)


@pytest.mark.parametrize("target", [0.1, 0.33, 0.04])
def test_seconds_lie_between_two_runs_around_the_loss(target):
    """Fewer iterations where KFC is ahead at 300 (a loss of 0.1), more where it is behind."""
    runs = sooner.search(run_of, run_of(300), target, most=1200)
    seconds = sooner.crossing(runs, target)
    assert seconds == pytest.approx(2 + 0.1 * 30 / target, rel=0.01)
    assert all((run.loss > target) != (runs[-1].loss > target) for run in runs[:-1])


def test_a_loss_out_of_reach_has_no_seconds():
    runs = sooner.search(run_of, run_of(300), 0.01, most=1200)
    assert [run.iterations for run in runs] == [300, 424, 600, 849]
    assert sooner.crossing(runs, 0.01) is None


def test_networks_are_trained_as_told(monkeypatch, capsys, tmp_path):
    asked = []

    def train(family, setting, seed, iterations, seconds=None):
        asked.append((family, setting, seed, iterations, seconds))
        return run_of(iterations) if seconds is None else run_of(150, seconds / 150)

    monkeypatch.setattr(sooner, "train", train)
    arguments = [
        "sooner",
        "--families",
        "vit",
        "--seeds",
        "4",
        "--output",
        str(tmp_path / "a.json"),
    ]
    monkeypatch.setattr("sys.argv", arguments)
    sooner.main()
    assert asked[:2] == [
        ("vit", "KFC(cosine(0.03))", 4, 300, None),
        ("vit", "Adam(0.003)", 4, 300, 32.0),
    ]
    assert [call[3] for call in asked[2:]] == [212, 150, 106]
    # 32 and 2 seconds of start-up, against 17.
    assert "2.00 times sooner" in " ".join(capsys.readouterr().out.split())
