"""Steps of the learning rate times the direction, without a bound."""

import tensorflow as tf

from keras_kfc.steps.api import StepQuery


class PlainSteps:
    """`α_b = η`."""

    def rates(self, query: StepQuery) -> tf.Tensor:
        """The learning rate for each block, `(variables,)`."""
        return tf.fill(tf.shape(query.squares), query.learning_rate)

    def momentum(self, query: StepQuery) -> float:
        """What the optimizer was given."""
        return query.momentum

    def longest(self, query: StepQuery) -> tf.Tensor:
        """Likewise."""
        return self.rates(query)
