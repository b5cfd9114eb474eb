"""The Laplace approximation of the posterior over a trained model's weights."""

import math
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from keras_kfc.analysis.batches import Batches, drawn_seed, length_of
from keras_kfc.analysis.blocks import AnalysedBlock, analysed_blocks
from keras_kfc.analysis.likelihoods import PredictiveLikelihood, likelihood_of
from keras_kfc.analysis.linearised import ExampleJacobians
from keras_kfc.layers.instrument import temporarily_instrumented
from keras_kfc.losses.derivatives import FISHERS
from keras_kfc.losses.terms import loss_terms
from keras_kfc.utils.arguments import check_choice, check_number, check_positive_integer

# Of the search for the prior precision and the noise that explain the data best.
_MOST_ROUNDS, _PRECISE = 500, 1e-6


class LaplacePosterior:
    """A normal distribution over a model's weights around those that training has found.

    Its precision is `N s F̂ + δ I`: the approximate Fisher matrix `F̂` of the mean loss over N
    examples, block by block (MacKay 1992; Ritter, Botev & Barber 2018), with `s` from the loss
    to the negative logarithm of the likelihood, and the prior precision `δ`. Predictions are those
    of the model linearised in its weights, for which it is the right posterior (Immer, Korzepa &
    Bauer 2021). Made by `keras_kfc.laplace`.

    Attributes:
        prior_precision: `δ`.
        noise_variance: Variance of the targets, `σ²`, of squared errors; 1 for other losses.
        blocks: The blocks, with their `path` and eigenvalues `values`. Weights of other layers,
            and of variables without a block, are fixed.
    """

    def __init__(
        self,
        model: keras.Model,
        blocks: Sequence[AnalysedBlock],
        likelihood: PredictiveLikelihood,
        examples: int,
        loss: float,
        batch_size: int,
    ):
        self.blocks = list(blocks)
        self.prior_precision, self.noise_variance = 1.0, 1.0
        self._model, self._likelihood = model, likelihood
        self._examples, self._loss, self._batch_size = examples, loss, batch_size
        self._weights = [v.numpy().astype("float64") for v in model.trainable_variables]
        means = [block.coordinates(self._weights) for block in self.blocks]
        self._squared_norm = float(sum(np.square(mean).sum() for mean in means))
        self._values = np.concatenate([block.values.ravel() for block in self.blocks])
        with temporarily_instrumented(model):
            self._jacobians = ExampleJacobians(model, likelihood.latent, self.blocks)

    def log_marginal_likelihood(
        self, prior_precision: float | None = None, noise_variance: float | None = None
    ) -> float:
        """The logarithm of the evidence, `log p(data)`, by Laplace's approximation.

        Args:
            prior_precision: `δ`, or None for that of now.
            noise_variance: `σ²` of squared errors, or None for that of now.
        """
        prior = self.prior_precision if prior_precision is None else prior_precision
        noise = self.noise_variance if noise_variance is None else noise_variance
        prior = check_number("prior_precision", prior, 0, exclude_low=True)
        noise = check_number("noise_variance", noise, 0, exclude_low=True)
        likelihood = self._likelihood
        of_example = likelihood.log_normaliser(noise) - likelihood.scale(noise) * self._loss
        occam = np.log1p(self._precision_factor(noise) * self._values / prior).sum()
        return float(self._examples * of_example - prior * self._squared_norm / 2 - occam / 2)

    def optimize(self, prior: bool = True, noise: bool = True) -> None:
        """Sets prior precision and noise to those with the largest evidence (MacKay 1992).

        Args:
            prior: Whether to look for the prior precision.
            noise: Whether to look for the variance of the targets of squared errors.
        """
        noise = noise and self._likelihood.has_noise
        squared_error = self._loss * self._likelihood.outputs * self._examples
        for _ in range(_MOST_ROUNDS):
            before = self.prior_precision, self.noise_variance
            seen = self._precision_factor(self.noise_variance) * self._values
            # How many directions in the space of weights the data decide.
            decided = float(np.sum(seen / (seen + self.prior_precision)))
            if noise:
                left = max(self._examples * self._likelihood.outputs - decided, 1e-3)
                self.noise_variance = max(squared_error / left, 1e-12)
            if prior:
                self.prior_precision = max(decided, 1e-12) / max(self._squared_norm, 1e-12)
            after = self.prior_precision, self.noise_variance
            if all(abs(math.log(b / a)) < _PRECISE for a, b in zip(before, after, strict=True)):
                break

    def outputs(self, x: Any) -> tuple[np.ndarray, np.ndarray]:
        """Mean and covariance of the linearised outputs (of logits, where there are classes).

        Args:
            x: Inputs, as the model takes them.

        Returns:
            `(B, K)` and `(B, K, K)`, float64; without the variance of the targets.
        """
        means, covariances = [], []
        with temporarily_instrumented(self._model):
            for inputs in _parts(x, self._batch_size):
                mean, jacobians = self._jacobians(inputs)
                covariance = np.zeros((len(mean), mean.shape[1], mean.shape[1]))
                for block, jacobian in zip(self.blocks, jacobians, strict=True):
                    rows = block.eigenform.coordinates(jacobian)
                    rows = (rows / np.sqrt(self._precision_of(block))).reshape(*rows.shape[:2], -1)
                    rows = rows.transpose(1, 0, 2)
                    covariance += rows @ rows.transpose(0, 2, 1)
                means.append(mean)
                covariances.append(covariance)
        return np.concatenate(means), np.concatenate(covariances)

    def predict(
        self, x: Any, method: str = "probit", samples: int = 100, seed: int | None = None
    ) -> np.ndarray:
        """Predictions in the mean over the posterior: probabilities, or the mean of targets.

        Args:
            x: Inputs, as the model takes them.
            method: `"probit"`, a formula, or `"monte_carlo"`, a mean over drawn outputs.
            samples: Number of draws.
            seed: Seed of the draws, or None for a random one.

        Returns:
            `(B, K)`, float64.
        """
        check_choice("method", method, ("probit", "monte_carlo"))
        samples = check_positive_integer("samples", samples)
        seed = drawn_seed(seed)
        mean, covariance = self.outputs(x)
        if method == "probit":
            variance = np.diagonal(covariance, axis1=1, axis2=2)
            return self._likelihood.probit(mean, variance)
        values, vectors = np.linalg.eigh(covariance)
        root = vectors * np.sqrt(np.maximum(values, 0))[:, None, :]
        draws = np.random.default_rng(seed).normal(size=(samples, *mean.shape))
        latent = mean + np.einsum("bij,sbj->sbi", root, draws)
        predictions: np.ndarray = self._likelihood.from_latent(latent).mean(axis=0)
        return predictions

    def predictive_variance(self, x: Any) -> np.ndarray:
        """Variance of the outputs (of logits, where there are classes), `(B, K)`.

        That of targets of squared errors counts, too.
        """
        variance = np.diagonal(self.outputs(x)[1], axis1=1, axis2=2)
        noise = self.noise_variance if self._likelihood.has_noise else 0.0
        total: np.ndarray = variance + noise
        return total

    def sample(self, count: int, seed: int | None = None) -> list[list[np.ndarray]]:
        """Draws of the trainable weights, each a list in the order of `trainable_variables`.

        Args:
            count: Number of draws.
            seed: Seed of the draws, or None for a random one.
        """
        rng = np.random.default_rng(drawn_seed(seed))
        draws = []
        for _ in range(check_positive_integer("count", count)):
            weights = [part.copy() for part in self._weights]
            for block in self.blocks:
                z = rng.normal(size=block.values.shape)
                for index, change in block.weights(z / np.sqrt(self._precision_of(block))).items():
                    weights[index] += change
            draws.append(weights)
        return draws

    def _precision_factor(self, noise: float) -> float:
        return self._examples * self._likelihood.scale(noise)

    def _precision_of(self, block: AnalysedBlock) -> np.ndarray:
        """Eigenvalues of the precision of one block."""
        return self._precision_factor(self.noise_variance) * block.values + self.prior_precision


def laplace(
    model: keras.Model,
    x: Any,
    y: Any,
    *,
    loss: Any = None,
    structure: str = "kronecker",
    layers: str = "all",
    prior_precision: float | None = None,
    noise_variance: float | None = None,
    fisher: str = "exact",
    batch_size: int = 64,
    seed: int | None = None,
) -> LaplacePosterior:
    """The posterior over the weights of a trained model, by Laplace's approximation.

    For models with one output, `(examples, K)`, trained with a cross-entropy (of classes or of
    events) or the squared error. The model runs in inference mode, and nothing about it changes.

    Args:
        model: A trained model, instrumented or not.
        x: The data that it was trained on.
        y: Their targets.
        loss: The loss, as `keras.Model.compile` takes it. Defaults to the compiled one.
        structure: What layers' blocks are kept as: `"kronecker"`, `"eigenbasis"`, `"diagonal"`, or
            `"full"`, which is for layers of few weights.
        layers: `"all"`, or `"last"` for the last layer that has a block; the others' weights
            are fixed then.
        prior_precision: `δ`, or None for the one with the largest evidence.
        noise_variance: `σ²` of squared errors, or None likewise.
        fisher: As of `keras_kfc.KroneckerFisherOperator`.
        batch_size: Number of examples to run at a time.
        seed: Seed of random numbers, or None for a random one.

    Returns:
        A `keras_kfc.LaplacePosterior`.

    Raises:
        TypeError: If `model` is not a Keras model, or `x` or `y` hold something else than arrays.
        ValueError: If an argument is out of range, arrays differ in length, the loss or the shape
            of the output is none of the above, or no layer has a block.

    Example:

    >>> rng = np.random.default_rng(0)
    >>> x, y = rng.normal(size=(64, 3)), rng.normal(size=(64, 1))
    >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    >>> model.compile("adam", "mse")
    >>> posterior = keras_kfc.laplace(model, x, y)
    >>> mean, covariance = posterior.outputs(x[:5])
    >>> mean.shape, covariance.shape
    ((5, 1), (5, 1, 1))
    """
    check_choice("structure", structure, ("kronecker", "eigenbasis", "diagonal", "full"))
    check_choice("layers", layers, ("all", "last"))
    check_choice("fisher", fisher, FISHERS)
    for name, given in (("prior_precision", prior_precision), ("noise_variance", noise_variance)):
        if given is not None:
            check_number(name, given, 0, exclude_low=True)
    seed = drawn_seed(seed)
    if y is None:
        raise ValueError("Argument `y` is needed for a posterior. Received: y=None")
    with temporarily_instrumented(model):
        batches = Batches(model, x, y, loss, batch_size)
        likelihood, total = None, 0.0
        for _, size, inputs, targets in batches:
            outputs = batches.call(inputs)
            likelihood = likelihood or likelihood_of(loss_terms(batches.compiled, targets, outputs))
            total += size * float(batches.compiled(targets, outputs)) / batches.examples
        blocks = analysed_blocks(batches, model.trainable_variables, structure, fisher, seed)
    if not blocks:
        raise ValueError(
            "Argument `model` must have a layer with a block. `keras_kfc.coverage(model)` tells "
            "which layers have none, and why."
        )
    assert likelihood is not None
    blocks = blocks if layers == "all" else blocks[-1:]
    posterior = LaplacePosterior(model, blocks, likelihood, batches.examples, total, batch_size)
    if prior_precision is not None:
        posterior.prior_precision = float(prior_precision)
    if noise_variance is not None:
        posterior.noise_variance = float(noise_variance)
    posterior.optimize(prior=prior_precision is None, noise=noise_variance is None)
    return posterior


def _parts(x: Any, size: int) -> Any:
    """Batches of inputs."""
    for start in range(0, length_of("x", x), size):
        yield keras.tree.map_structure(lambda part, s=start: part[s : s + size], x)
