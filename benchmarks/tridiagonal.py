"""Is a block-tridiagonal Fisher matrix worth its code?

`python -m benchmarks.tridiagonal` trains deep autoencoders by algorithm 2 of Martens & Grosse
(2015): a step and its momentum from the exact quadratic model of the batch, damping by
Levenberg and Marquardt; once with the block-diagonal inverse and once with the block-tridiagonal
one (`benchmarks.chains`). `KFC()` and `KFC(step="quadratic")` train on the same batches. It prints
the loss over the training set, and the seconds of all steps.

It differs from the paper in this: batches have one size, factors are of the whole batch, the
search for `γ` is left out (`γ = √(λ + η)`), and weights are not averaged.
"""

import argparse
import os
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf

import keras_kfc
from benchmarks.chains import BlockDiagonal, BlockTridiagonal, Factors, Matrices
from benchmarks.harness import report
from benchmarks.nets import autoencoder
from benchmarks.runs import optimizer_of
from benchmarks.tasks import load_fashion_mnist
from examples.data import load_digits
from examples.nets import digits_autoencoder

INVERSES: dict[str, Callable[[Factors], Any]] = {
    "block-diagonal": BlockDiagonal,
    "block-tridiagonal": BlockTridiagonal,
}
# The paper's: what λ is multiplied by for each step (section 6.5), and the period of inverses.
CHANGE, PERIOD = 19 / 20, 20
DECAY_OF_WEIGHTS = 1e-5


def _pixels(images: np.ndarray) -> np.ndarray:
    flat = images.reshape(len(images), -1)
    return (flat - flat.min()) / (flat.max() - flat.min())


TASKS: dict[str, tuple[Callable[[int], keras.Model], Callable[[], np.ndarray]]] = {
    "digits": (digits_autoencoder, lambda: _pixels(load_digits().train_images)),
    "fashion-mnist": (
        lambda seed: autoencoder((784,), seed),
        lambda: _pixels(load_fashion_mnist("/usr/share/datasets/fashion-mnist").train_images),
    ),
}


class Chain:
    """A chain of dense layers with sigmoid outputs and binary cross-entropy, summed over outputs.

    Args:
        model: A Keras model of such layers, whose weights are the first ones.
    """

    def __init__(self, model: keras.Model):
        layers = [layer for layer in model.layers if isinstance(layer, keras.layers.Dense)]
        self._activations = [layer.activation for layer in layers[:-1]]
        self.weights = [
            tf.Variable(tf.concat((layer.kernel, layer.bias[None]), axis=0)) for layer in layers
        ]

    def outputs(self, x: tf.Tensor) -> tuple[tf.Tensor, list[tf.Tensor], list[tf.Tensor]]:
        """Logits, inputs with a one and pre-activations of all layers."""
        inputs, sums = [], []
        for weights, activation in zip(self.weights, [*self._activations, None], strict=True):
            inputs.append(tf.pad(x, ((0, 0), (0, 1)), constant_values=1.0))
            sums.append(inputs[-1] @ weights)
            x = sums[-1] if activation is None else activation(sums[-1])
        return x, inputs, sums

    @tf.function
    def loss(self, x: tf.Tensor) -> tf.Tensor:
        """Mean over examples, with the decay of weights."""
        logits, _, _ = self.outputs(x)
        return self._value(logits, x)

    def _value(self, logits: tf.Tensor, x: tf.Tensor) -> tf.Tensor:
        each = tf.nn.sigmoid_cross_entropy_with_logits(x, logits)
        decay = tf.add_n([tf.nn.l2_loss(weights) for weights in self.weights])
        return tf.reduce_mean(tf.reduce_sum(each, axis=1)) + DECAY_OF_WEIGHTS * decay

    @tf.function
    def gradient_and_factors(self, x: tf.Tensor) -> tuple[Any, ...]:
        """The gradient, and the factors of the batch with targets drawn from the prediction."""
        with tf.GradientTape(persistent=True) as tape:
            logits, inputs, sums = self.outputs(x)
            value = self._value(logits, x)
        probabilities = tf.sigmoid(logits)
        drawn = tf.cast(tf.random.uniform(tf.shape(logits)) < probabilities, tf.float32)
        derivatives = tape.gradient(logits, sums, output_gradients=probabilities - drawn)
        gradients = tape.gradient(value, self.weights)
        count = tf.cast(tf.shape(x)[0], tf.float32)

        def moments(rows: list[tf.Tensor], others: list[tf.Tensor]) -> list[tf.Tensor]:
            pairs = zip(rows, others, strict=True)
            return [tf.matmul(a, b, transpose_a=True) / count for a, b in pairs]

        return gradients, (
            moments(inputs, inputs),
            moments(derivatives, derivatives),
            moments(inputs[:-1], inputs[1:]),
            moments(derivatives[:-1], derivatives[1:]),
        )

    @tf.function
    def curvature(self, x: tf.Tensor, first: Any, second: Any) -> tf.Tensor:
        """`Vᵀ F V` of two directions, `(2, 2)`, with the exact Fisher matrix of the batch."""
        moved = []
        for direction in (first, second):
            with tf.autodiff.ForwardAccumulator(self.weights, direction) as accumulator:
                logits, _, _ = self.outputs(x)
            moved.append(accumulator.jvp(logits))
        probabilities = tf.sigmoid(logits)
        scale = probabilities * (1 - probabilities)
        entries = [[tf.reduce_sum(a * scale * b, axis=1) for b in moved] for a in moved]
        return tf.reduce_mean(tf.convert_to_tensor(entries), axis=2)


def paper(chain: Chain, batches: Any, steps: int, kind: str, damping: float, looks: Any) -> None:
    """Trains by algorithm 2.

    Args:
        chain: The chain.
        batches: Iterator of batches.
        steps: Number of steps.
        kind: Which of `INVERSES`.
        damping: `λ` at first.
        looks: Called with the number of steps and the seconds that they took, after each.
    """
    seconds = 0.0
    factors: Factors | None = None
    before: Matrices = [np.zeros(weights.shape, "float32") for weights in chain.weights]
    inverse: Any = None
    for step in range(1, steps + 1):
        x = next(batches)
        begin = time.perf_counter()
        gradients, parts = chain.gradient_and_factors(x)
        gradients = [part.numpy() for part in gradients]
        batch = Factors(*([matrix.numpy() for matrix in part] for part in parts))
        factors = batch if factors is None else factors.moved(batch, min(1 - 1 / step, 0.95))
        if step <= 3 or step % PERIOD == 0:
            inverse = INVERSES[kind](factors.damped(np.sqrt(damping + DECAY_OF_WEIGHTS)))
        proposal = [-part.astype("float32") for part in inverse.times(gradients)]
        pair = (proposal, before)
        matrix = chain.curvature(x, *pair).numpy().astype("float64")
        norms = np.array([[_dot(a, b) for b in pair] for a in pair])
        matrix += (damping + DECAY_OF_WEIGHTS) * norms
        slope = np.array([_dot(gradients, part) for part in pair])
        if step == 1:
            matrix[1, 1] = 1.0
        factors_of = -np.linalg.solve(matrix, slope)
        change = [factors_of[0] * a + factors_of[1] * b for a, b in zip(*pair, strict=True)]
        change = [part.astype("float32") for part in change]
        check = step % 5 == 0
        old = float(chain.loss(x)) if check else 0.0
        for weights, part in zip(chain.weights, change, strict=True):
            weights.assign_add(part)
        if check:
            # The model's value at its minimum, damping included.
            promised = 0.5 * factors_of @ slope
            ratio = (float(chain.loss(x)) - old) / promised
            damping *= CHANGE**5 if ratio > 0.75 else CHANGE**-5 if ratio < 0.25 else 1.0
        before = change
        seconds += time.perf_counter() - begin
        looks(step, seconds)


def _dot(first: Matrices, second: Matrices) -> float:
    return float(sum(np.vdot(a, b) for a, b in zip(first, second, strict=True)))


def curve(
    task: str, setting: str, seed: int, batch: int, looks: list[int], damping: float = 0.0
) -> dict[str, Any]:
    """Trains with one optimizer; a row of the table, losses being means over outputs.

    Args:
        task: Which of `TASKS`.
        setting: One of `INVERSES`, or the call of an optimizer.
        seed: Of weights and batches.
        batch: Examples in a batch.
        looks: After how many steps to measure the loss.
        damping: `λ` at first, for `INVERSES`.
    """
    build, load = TASKS[task]
    x = load().astype("float32")
    model = build(seed)
    tf.random.set_seed(seed)
    data = tf.data.Dataset.from_tensor_slices(x).shuffle(len(x), seed=seed).repeat().batch(batch)
    part = x[:10_000]
    row: dict[str, Any] = {"optimizer": setting, "seed": seed}
    if setting in INVERSES:
        chain = Chain(model)

        def look(step: int, seconds: float) -> None:
            if step in looks:
                row[f"{step}"] = float(chain.loss(part)) / x.shape[1]
                row["seconds"] = seconds

        row["optimizer"] = f"{setting}, λ = {damping:g} at first"
        paper(chain, iter(data), looks[-1], setting, damping, look)
        return row
    keras_kfc.instrument(model)
    model.compile(optimizer_of(setting, seed), "binary_crossentropy")
    seconds = 0.0
    for step, rows in enumerate(data.take(looks[-1]), 1):
        begin = time.perf_counter()
        model.train_on_batch(rows, rows)
        seconds += time.perf_counter() - begin
        if step in looks:
            row[f"{step}"] = float(model.evaluate(part, part, batch_size=1000, verbose=0))
            row["seconds"] = seconds
    return row


def main() -> None:
    """Trains and prints."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tridiagonal", description=__doc__)
    parser.add_argument("--task", choices=list(TASKS), default="digits")
    parser.add_argument("--batch-size", type=int, default=1000)
    parser.add_argument("--looks", type=int, nargs="+", default=[25, 50, 100, 200])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--dampings", type=float, nargs="+", default=[1.0, 10.0], help="first λ")
    arguments = parser.parse_args()
    rows = []
    for seed in arguments.seeds:
        tried = [(kind, damping) for damping in arguments.dampings for kind in INVERSES]
        for setting, damping in (*tried, ("KFC()", 0.0), ("KFC(step='quadratic')", 0.0)):
            row = curve(
                arguments.task, setting, seed, arguments.batch_size, arguments.looks, damping
            )
            rows.append(row)
            print(row, flush=True)
            keras.backend.clear_session()
    report(f"tridiagonal-{arguments.task}", f"Training loss after steps, {arguments.task}", rows)


if __name__ == "__main__":
    main()
