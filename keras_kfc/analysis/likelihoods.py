"""What a posterior needs of a loss: its likelihood, and predictions from outputs with variance.

In units of the Keras loss, which averages over outputs: the negative logarithm of the likelihood
of an example is `scale` times the loss, up to a constant.
"""

import abc
import math
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_kfc._compat.keras_internals import logits_of
from keras_kfc.losses.terms import LossTerm, known_function


class PredictiveLikelihood(abc.ABC):
    """The likelihood of one loss.

    Args:
        term: The loss term of a batch.
        options: Options of the loss function.
    """

    # Whether there is a variance of the targets to be found.
    has_noise = False

    def __init__(self, term: LossTerm, options: dict[str, Any]):
        self.from_logits = bool(options.get("from_logits", False))
        self.outputs = int(np.prod(term.y_pred.shape[1:]))

    def latent(self, outputs: tf.Tensor) -> tf.Tensor:
        """The outputs that are linearised, computed where a tape records: logits for classes."""
        return outputs

    @abc.abstractmethod
    def scale(self, noise: float) -> float:
        """What the Keras loss of an example is multiplied by, for a variance of the targets."""

    def log_normaliser(self, noise: float) -> float:
        """What is added to the logarithm of the likelihood of an example."""
        del noise
        return 0.0

    @abc.abstractmethod
    def from_latent(self, latent: np.ndarray) -> np.ndarray:
        """Predictions, `(..., K)`, from latent outputs."""

    def probit(self, mean: np.ndarray, variance: np.ndarray) -> np.ndarray:
        """Predictions from latent outputs of a mean and variance, both `(B, K)`."""
        # MacKay (1992): the logistic function for the distribution function of a normal one.
        return self.from_latent(mean / np.sqrt(1 + math.pi / 8 * variance))


class Classes(PredictiveLikelihood):
    """One class of K."""

    def latent(self, outputs: tf.Tensor) -> tf.Tensor:
        """Logits, or the logarithms of probabilities, which are logits, too."""
        logits = logits_of(outputs)
        if self.from_logits or logits is not None:
            return outputs if logits is None else logits
        return tf.math.log(outputs)

    def scale(self, noise: float) -> float:
        """One."""
        del noise
        return 1.0

    def from_latent(self, latent: np.ndarray) -> np.ndarray:
        """Softmax."""
        exponentials = np.exp(latent - latent.max(-1, keepdims=True))
        return exponentials / exponentials.sum(-1, keepdims=True)


class Events(PredictiveLikelihood):
    """Independent events, over whose losses Keras averages."""

    def latent(self, outputs: tf.Tensor) -> tf.Tensor:
        """Logits."""
        logits = logits_of(outputs)
        if self.from_logits or logits is not None:
            return outputs if logits is None else logits
        return tf.math.log(outputs) - tf.math.log1p(-outputs)

    def scale(self, noise: float) -> float:
        """The number of events."""
        del noise
        return float(self.outputs)

    def from_latent(self, latent: np.ndarray) -> np.ndarray:
        """Logistic function."""
        return np.exp(-np.logaddexp(0, -latent))


class Normal(PredictiveLikelihood):
    """Normal targets around the outputs, with a variance to be found."""

    has_noise = True

    def scale(self, noise: float) -> float:
        """`K / (2 σ²)`."""
        return self.outputs / (2 * noise)

    def log_normaliser(self, noise: float) -> float:
        """`-K/2 log(2 π σ²)`."""
        return -self.outputs / 2 * math.log(2 * math.pi * noise)

    def from_latent(self, latent: np.ndarray) -> np.ndarray:
        """The outputs."""
        return latent

    def probit(self, mean: np.ndarray, variance: np.ndarray) -> np.ndarray:
        """The mean."""
        del variance
        return mean


_LIKELIHOODS = (
    (keras.losses.sparse_categorical_crossentropy, Classes),
    (keras.losses.categorical_crossentropy, Classes),
    (keras.losses.binary_crossentropy, Events),
    (keras.losses.mean_squared_error, Normal),
)


def likelihood_of(terms: list[LossTerm]) -> PredictiveLikelihood:
    """The likelihood of a model's only loss term.

    Raises:
        ValueError: If the model has several, or outputs at several positions, or the loss is none
            of those that are known.
    """
    if len(terms) != 1:
        raise ValueError(
            f"A posterior is for models with one output and one loss. Received: {len(terms)} losses"
        )
    (term,) = terms
    if term.y_pred.shape.rank != 2:
        raise ValueError(
            "A posterior is for models whose output is of the shape (examples, outputs). "
            f"Received: shape {tuple(term.y_pred.shape)}"
        )
    function, options = known_function(term.loss)
    kind = next((kind for known, kind in _LIKELIHOODS if known is function), None)
    if kind is None:
        names = [known.__name__ for known, _ in _LIKELIHOODS]
        raise ValueError(
            f"A posterior is known for the losses {', '.join(names[:-1])} and {names[-1]}. "
            f'Received: loss="{term.name}"'
        )
    return kind(term, options)
