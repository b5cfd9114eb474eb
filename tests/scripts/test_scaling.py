"""The benchmark of batch sizes: what it tunes, shows and projects."""

import dataclasses
import math

import keras
import numpy as np
import pytest
import tensorflow as tf

from benchmarks import projection, runs, scaling
from benchmarks.tasks import task_of

pytestmark = pytest.mark.slow


@pytest.mark.nightly
def test_scaling_tunes_at_each_batch_size(tmp_path, capsys):
    scaling.main(
        [
            *("--task", "digits/mlp", "--examples", "200", "--batch-sizes", "20", "40"),
            *("--iterations", "10", "--target", "2.2", "--output", str(tmp_path)),
            *("--optimizers", "KFC()", "SGD"),
        ]
    )
    # Titles are broken to the width of their tables.
    output = " ".join(capsys.readouterr().out.split())
    assert "batch size" in output and "SGD was" in output
    assert "Projected seconds" in output and "Milliseconds of a step at batch 20" in output
    assert (tmp_path / "digits-mlp-scaling" / "scaling.png").read_bytes().startswith(b"\x89PNG")


def test_projected_seconds_are_steps_and_exchanges():
    """Four workers send each number three quarters of the way twice, at 10 Gbit/s."""
    ring = 2 * 3 / 4 * 4 / 1.25e9
    of_gradients = 20 * (1000 * ring + 4e-5)
    assert projection.exchange_seconds((1000, 0), 20, 4, 10) == pytest.approx(of_gradients)
    # Factors are due in steps 0 to 7, 8, 10, 12, 14 and 16 of the first twenty.
    both = projection.exchange_seconds((1000, 500), 20, 4, 10)
    assert both == pytest.approx(of_gradients + 13 * (500 * ring + 4e-5))
    assert projection.exchange_seconds((1000, 500), 20, 1, 10) == 0
    results = {
        "KFC()": {64: [30.0, 40.0, 50.0], 128: [20.0] * 3},
        "SGD": {64: [9.0], 128: [math.inf]},
    }
    assert projection.most_steps(results) == {"KFC()": 40, "SGD": 9}
    # The first steps take longer.
    steps = {"KFC()": [0.2] * 10 + [0.1] * 30, "SGD": [0.05] * 9}
    rows = projection.table_of(results, steps, dict.fromkeys(steps, (0, 0)))
    assert [row["workers"] for row in rows] == 3 * ["1"] + 3 * ["2"]
    assert rows[0]["KFC()"] == "5" and rows[0]["SGD"] == "0.45"
    assert rows[3]["KFC()"] == "3" and rows[3]["SGD"] == "-"


def test_numbers_exchanged_are_parameters_and_halves_of_factors():
    """Of two layers, 64 and 16 inputs and a one, 16 and 10 outputs."""
    own = dataclasses.replace(
        task_of("digits/mlp", examples=200),
        build=lambda seed: keras.Sequential(
            [keras.Input((8, 8, 1)), keras.layers.Flatten(), *map(keras.layers.Dense, (16, 10))]
        ),
    )
    parameters = 65 * 16 + 17 * 10
    halves = sum(n * (n + 1) // 2 for n in (65, 16, 17, 10))
    assert projection.numbers_exchanged(own, "SGD(0.1)") == (parameters, 0)
    assert projection.numbers_exchanged(own, "KFC()") == (parameters, halves)


def test_lars_scales_gradients_to_the_norms_of_matrices():
    rng = np.random.default_rng(0)
    kernel, bias = rng.normal(size=(3, 4)), rng.normal(size=4)
    variables = [keras.Variable(value, dtype="float64") for value in (kernel, bias)]
    optimizer = runs.optimizer_of("LARS(2.0, momentum=0.5, trust=0.01)")
    momenta = [0.0, 0.0]
    for _ in range(2):
        gradients = [rng.normal(size=value.shape) for value in (kernel, bias)]
        optimizer.apply([tf.constant(gradient) for gradient in gradients], variables)
        scale = 0.01 * np.linalg.norm(kernel) / np.linalg.norm(gradients[0])
        momenta = [
            0.5 * momentum - 2.0 * gradient
            for momentum, gradient in zip(
                momenta, (scale * gradients[0], gradients[1]), strict=True
            )
        ]
        kernel, bias = kernel + momenta[0], bias + momenta[1]
    for variable, value in zip(variables, (kernel, bias), strict=True):
        np.testing.assert_allclose(variable, value, rtol=1e-6)
    still = keras.Variable(np.zeros((2, 2)), dtype="float32")
    runs.optimizer_of("LARS(1.0)").apply([tf.zeros((2, 2))], [still])
    assert not still.numpy().any()
    # There is no norm to scale to: the plain step.
    runs.optimizer_of("LARS(0.5)").apply([tf.ones((2, 2))], [still])
    np.testing.assert_allclose(still, np.full((2, 2), -0.5))


def test_scaling_shows_what_was_missed(tmp_path):
    results = {"KFC()": {64: [30.0, 40.0, 50.0]}, "SGD": {64: [90.0, math.inf, math.inf]}}
    chosen = {"KFC()": {64: "KFC()"}, "SGD": {64: "SGD(0.1)"}}
    (row,) = scaling.table_of(results, chosen, 3000)
    assert row["KFC()"] == "40 (30–50)"
    assert row["SGD"] == ">3,000" and row["SGD was"] == "SGD(0.1)"
    scaling.draw(results, "title", 3000, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
