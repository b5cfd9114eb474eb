"""The Fisher block of one layer: moving averages, damped inverses, preconditioning.

A block owns no numbers itself: its state lives in variables of the optimizer,
so that Keras saves and restores it with the optimizer.
"""

from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_kfc.curvature.layout import Partition
from keras_kfc.placement.replicas import copies_of


class KroneckerBlock:
    """State of one layer's block `omega ⊗ gamma`.

    Args:
        path: The layer's path.
        partition: The layout of the layer's factors, with its linear_map.
        kernel: Index of the kernel among the optimizer's variables.
        bias: Index of the bias, or None if none is trained.
        dtype: Dtype of factors and inverses.
        add_variable: The optimizer's `add_variable`.

    Attributes:
        omega: Moving average of the input factor, `(G * P, n, n)`; G groups of P
            parts, see `keras_kfc.curvature.layout`.
        gamma: Moving average of the output factor, `(G * Q, m, m)`.
        omega_inverse: Damped inverse of omega, likewise.
        gamma_inverse: Damped inverse of gamma, likewise.
        weight: Number of examples in the moving averages, each with the weight that is left of
            it, a scalar; 0 before the first update.
        inverted: 1 once the inverses hold numbers, 0 before.
    """

    def __init__(
        self,
        path: str,
        partition: Partition,
        kernel: int,
        bias: int | None,
        dtype: str,
        add_variable: Callable[..., keras.Variable],
    ):
        self.path = path
        self.partition = partition
        self.linear_map = partition.linear_map
        self.kernel = kernel
        self.bias = bias

        def add(name: str, *shape: int) -> keras.Variable:
            full_name = f"{path.replace('/', '_')}_{name}"
            return add_variable(shape=shape, dtype=dtype, name=full_name)

        self.omega = add("omega", *partition.omega_shape)
        self.gamma = add("gamma", *partition.gamma_shape)
        self.omega_inverse = add("omega_inverse", *partition.omega_shape)
        self.gamma_inverse = add("gamma_inverse", *partition.gamma_shape)
        self.weight = add("weight")
        self.inverted = add("inverted")

    @property
    def variables(self) -> list[keras.Variable]:
        """All variables of the block."""
        factors = [self.omega, self.gamma, self.omega_inverse, self.gamma_inverse]
        return [*factors, self.weight, self.inverted]

    def accumulate(
        self,
        omega: tf.Tensor,
        gamma: tf.Tensor,
        examples: tf.Tensor,
        decay: tf.Tensor,
        sound: tf.Tensor,
    ) -> tf.Tensor:
        """Moves the averages towards the factors of one batch.

        Every example counts alike, whatever batch it came in. The first batch counts in full,
        so that the average is usable from the start. Factors that hold a NaN or an
        infinity are left out.

        Args:
            omega: Input factor of the batch.
            gamma: Output factor of the batch.
            examples: Number of examples that they are means over, a scalar.
            decay: What is left of the weight of former batches, a scalar in [0, 1].
            sound: Whether the batch may be used at all, a boolean scalar.

        Returns:
            Whether the batch was left out, a boolean scalar.
        """
        usable = sound & all_finite([omega, gamma])
        examples = tf.cast(examples, self.weight.dtype)
        weight = tf.cast(decay, self.weight.dtype) * self.weight + examples
        rate = tf.math.divide_no_nan(examples, weight)
        # Selecting between numbers costs less than a branch of the graph for each block.
        for average, batch in ((self.omega, omega), (self.gamma, gamma)):
            change = rate * (tf.cast(batch, average.dtype) - average)
            average.assign_add(tf.where(usable, change, 0.0))
        self.weight.assign(tf.where(usable, weight, self.weight))
        return ~usable

    def parts_of(self, name: str) -> list[np.ndarray]:
        """The diagonal blocks of a factor or an inverse, without the rows that fill them up.

        Args:
            name: `"omega"`, `"gamma"`, `"omega_inverse"` or `"gamma_inverse"`.
        """
        rows = self.partition.omega_rows if name.startswith("omega") else self.partition.gamma_rows
        return [
            part[np.ix_(own, own)]
            for part, own in zip(getattr(self, name).numpy(), rows, strict=True)
        ]

    def has_data(self) -> tf.Tensor:
        """Whether the factors hold anything on any replica, a boolean scalar."""
        return any_of([weight > 0 for weight in copies_of(self.weight)])

    def average_over_replicas(self) -> None:
        """Gives all replicas the average of their factors; in cross-replica context.

        Each replica counts with its weight: one that has left out batches has seen less.
        """
        weights = [tf.convert_to_tensor(weight) for weight in copies_of(self.weight)]
        total = tf.add_n(weights)
        for factor in (self.omega, self.gamma):
            copies = copies_of(factor)
            average = tf.add_n(
                [
                    tf.math.divide_no_nan(weight, total) * copy
                    for weight, copy in zip(weights, copies, strict=True)
                ]
            )
            factor.value.assign(average)
        self.weight.value.assign(tf.reduce_max(weights))

    def store_inverses(self, omega_inverse: tf.Tensor, gamma_inverse: tf.Tensor) -> tf.Tensor:
        """Takes over new inverses, or keeps the last good ones.

        Args:
            omega_inverse: Of the shape of omega.
            gamma_inverse: Of the shape of gamma.

        Returns:
            Whether the inverses were refused because they hold a NaN or an
            infinity though the block has seen data, a boolean scalar.
        """
        has_data = self.weight > 0
        usable = all_finite([omega_inverse, gamma_inverse]) & has_data
        self.omega_inverse.assign(tf.where(usable, omega_inverse, self.omega_inverse))
        self.gamma_inverse.assign(tf.where(usable, gamma_inverse, self.gamma_inverse))
        self.inverted.assign(tf.where(usable, tf.ones((), self.inverted.dtype), self.inverted))
        return has_data & ~usable

    def precondition(self, joint: tf.Tensor) -> tf.Tensor:
        """Applies `omega⁻¹ D gamma⁻¹` to a joint matrix D, `(G, n, m)`."""
        inverses = (
            tf.convert_to_tensor(self.omega_inverse),
            tf.convert_to_tensor(self.gamma_inverse),
        )
        return self.partition.multiply(inverses[0], joint, inverses[1])


def all_finite(tensors: list[Any]) -> tf.Tensor:
    """Whether no entry of any tensor is NaN or infinite, a boolean scalar."""
    return tf.reduce_all(tf.stack([tf.reduce_all(tf.math.is_finite(tensor)) for tensor in tensors]))


def any_of(conditions: Sequence[tf.Tensor]) -> tf.Tensor:
    """Whether any of some boolean scalars is true, a boolean scalar."""
    return conditions[0] if len(conditions) == 1 else tf.reduce_any(tf.stack(conditions))
