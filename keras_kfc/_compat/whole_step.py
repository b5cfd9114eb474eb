"""Keras's optimizer with a public place for rules that need all gradients at once. Read in 3.15.

Keras's own optimizers change one variable at a time, after Keras has clipped the gradients and
decayed the weights. Accumulated gradients, averages of weights, loss scaling, constraints and
counting stay Keras's here; the step itself, with clipping and decay, is one method.
"""

import contextlib
from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_kfc._compat.multi_worker_fit import mend_fit


class WholeStepOptimizer(keras.optimizers.Optimizer):
    """An optimizer whose step is one method, `take_step`, for all variables."""

    def __init__(self, **arguments: Any):
        super().__init__(**arguments)
        mend_fit()

    def take_step(
        self, gradients: Sequence[Any], variables: Sequence[Any], learning_rate: Any
    ) -> None:
        """Takes a step; to be defined by the subclass.

        Args:
            gradients: The gradients, on this replica, as the loss has them: neither clipped nor
                summed over replicas. Tensors or `tf.IndexedSlices`.
            variables: Their variables, Keras's or TensorFlow's.
            learning_rate: The learning rate of this step, a scalar.
        """
        raise NotImplementedError

    def clipped(self, gradients: Sequence[Any]) -> Sequence[Any]:
        """Gradients as `clipnorm`, `clipvalue` and `global_clipnorm` have them.

        Returns:
            The same object where nothing is to be clipped.
        """
        return super()._clip_gradients(gradients)

    def may_decay(self, variable: Any) -> bool:
        """Whether nobody has excluded a variable from weight decay."""
        # Names are those of TensorFlow's variables, which hold the layer's, too.
        value = variable.value if isinstance(variable, keras.Variable) else variable
        return self._use_weight_decay(value)

    def index_of(self, variable: Any) -> int:
        """The index of a variable among those that the optimizer was built with."""
        return self._get_variable_index(variable)

    @property
    def trained_variables(self) -> Sequence[Any]:
        """The variables that the optimizer was built with; empty before."""
        return list(getattr(self, "_trainable_variables", ()))

    @property
    def batches(self) -> keras.Variable:
        """Number of batches; `iterations` is that of steps where gradients are accumulated."""
        return self._iterations

    def forget_variable(self, variable: keras.Variable) -> None:
        """Takes a variable of the optimizer's own back."""
        self._untrack_variable(variable)

    def in_strategy(self) -> contextlib.AbstractContextManager[Any]:
        """The scope of the `tf.distribute` strategy that the optimizer was made in."""
        strategy: tf.distribute.Strategy = self._distribution_strategy
        return strategy.scope()

    # What Keras calls. A rename of the first makes Keras call `update_step`, which there is none
    # of; `tests/_compat/test_compat.py` tells of the others.

    def _backend_update_step(
        self, grads: Sequence[Any], trainable_variables: Sequence[Any], learning_rate: Any
    ) -> None:
        self.take_step(grads, trainable_variables, learning_rate)

    def _clip_gradients(self, grads: Sequence[Any]) -> Sequence[Any]:
        return grads

    def _apply_weight_decay(self, variables: Sequence[Any]) -> None:
        pass
