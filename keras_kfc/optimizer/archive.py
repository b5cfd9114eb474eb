"""How the optimizer's state is stored with a model and found again.

Keras stores optimizer variables by position and skips them, with a warning,
where their number differs. That would lose factors and momenta in three common
cases, for which the state waits here instead: the optimizer is not built yet;
it was stored before its first step; or it is the optimizer of a loaded model
whose layers live in a class of the user's own, and which `keras_kfc.instrument`
has still to give its blocks.
"""

import dataclasses
import json
import warnings
from collections.abc import Sequence, Set
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_kfc._compat.tensorflow_internals import outside_of_the_trace
from keras_kfc.placement.replicas import count_replicas

_LAYOUT = "layout"
# Of the stored state; to be raised when its layout changes, with a way to read the older ones.
FORMAT_VERSION = 1
# Endings of names; longer ones first.
_ROLES = (
    "omega_inverse",
    "gamma_inverse",
    "omega",
    "gamma",
    "weight",
    "inverted",
    "second_moment",
    "momentum",
    "average",
    "gradient_accumulator",
)

# What an optimizer knows beside its variables and its configuration.
_KEPT = ("_noticed", "_told", "_told_of", "pending_captures", "watched_steps")


@dataclasses.dataclass(frozen=True)
class StoredState:
    """Variables of an optimizer as they were stored.

    Args:
        arrays: Their values, by position.
        roles: What each variable was for.
        blocks: `[path, kernel, bias, omega shape, gamma shape]` of each Kronecker block,
            kernel and bias as indices.
        built: Whether the optimizer had been built.
        loaded_at: Iterations of the optimizer that loaded it, at that time.
        left_out: Indices of kernels without a block for want of statistics.
    """

    arrays: Sequence[np.ndarray]
    roles: list[str]
    blocks: list[list[Any]]
    built: bool
    loaded_at: int
    left_out: Sequence[int] = ()


class ResumableOptimizer(keras.optimizers.Optimizer):
    """The part of `keras_kfc.KFC` that saves and loads its variables."""

    blocks: Any
    # State that waits for `build` or `rebuild`.
    _stored: StoredState | None
    # Indices of kernels that the fallback rule trains for want of statistics.
    _left_out: frozenset[int]
    _momentums: tuple[Any, ...]
    _second_moments: tuple[Any, ...]
    # Identities of the variables that were there before `build`.
    _before_build: frozenset[int]

    def save_own_variables(self, store) -> None:
        """Stores all variables by position, and how they are laid out.

        Args:
            store: Keras's store, a mapping from names to arrays.
        """
        # Of several replicas, the copies of the first are stored. Averaging now or when
        # inverses are due comes to the same.
        with self._distribution_strategy.scope():
            self._average_over_replicas()
        waiting = self._stored if self.has_waiting_state() else None
        if waiting is None:
            super().save_own_variables(store)
            layout = {
                "version": FORMAT_VERSION,
                "built": self.built,
                "roles": self._roles(),
                "blocks": self._block_layout(),
                "left_out": sorted(self._left_out),
            }
        else:
            # Nobody has trained with it: what was loaded is stored again.
            for index, array in enumerate(waiting.arrays):
                store[str(index)] = array
            names = ("built", "roles", "blocks", "left_out")
            layout = {"version": FORMAT_VERSION, **{n: getattr(waiting, n) for n in names}}
        store[_LAYOUT] = np.frombuffer(json.dumps(layout).encode(), "uint8")

    def load_own_variables(self, store) -> None:
        """Takes over variables from a store, all or none.

        Args:
            store: Keras's store, a mapping from names to arrays.

        Raises:
            ValueError: If the stored blocks have other shapes than this optimizer's, or the
                state has a newer format than this version reads.
        """
        self._stored = None
        if _LAYOUT not in store.keys():  # noqa: SIM118  (Keras's stores have no `in`)
            self._warn_of_skipping("the stored state is that of another optimizer")
            return
        arrays = {key: np.asarray(store[key]) for key in store.keys()}  # noqa: SIM118
        layout = json.loads(arrays.pop(_LAYOUT).tobytes())
        version = layout.pop("version", 0)
        if version > FORMAT_VERSION:
            raise ValueError(
                f"The stored state of optimizer '{self.name}' has a newer format than this version "
                f"of keras_kfc reads. Expected: at most {FORMAT_VERSION}. Received: {version}. "
                "Install the version of keras_kfc that stored it, or a newer one."
            )
        stored = StoredState(
            [arrays[str(i)] for i in range(len(arrays))],
            **layout,
            loaded_at=int(self._iterations.numpy()),
        )
        if self.built and not self._left_out.issuperset(stored.left_out):
            self._stored = stored
            self.rebuild(self._trainable_variables)
        elif self.built or not stored.built:
            self._take_stored(stored)
        else:
            self._stored = stored

    def rebuild(self, variables: Sequence[keras.Variable]) -> None:
        """Builds anew, for layers that were instrumented after `build`.

        State that was loaded for these layers is taken over. All other state that
        `build` creates (factors, inverses, momenta) starts afresh.

        Args:
            variables: The trainable variables.
        """
        stored = self._stored if self.has_waiting_state() else None
        left_out = self._left_out
        # A fresh optimizer in the place of this one: TensorFlow saves no object whose
        # tracked lists have lost an element.
        with self._distribution_strategy.scope():
            fresh = type(self).from_config(self.get_config())
            self.__dict__.update(fresh.__dict__)
            self._stored = stored
            self._left_out = left_out
            self.build(variables)

    def leave_out(self, kernels: Set[int]) -> None:
        """Lets the fallback rule train layers in place of their blocks; all else stays.

        May be called while a train step is traced, before it uses the optimizer's variables.

        Args:
            kernels: Indices of the layers' kernels.
        """
        leaving = [block for block in self.blocks if block.kernel in kernels]
        theirs = {id(variable) for block in leaving for variable in block.variables}
        changed = {i for block in leaving for i in (block.kernel, block.bias) if i is not None}
        # Momentum is another thing to the fallback rule.
        theirs |= {id(self._momentums[i]) for i in changed}
        attributes = {name: self.__dict__[name] for name in _KEPT}
        with outside_of_the_trace():
            values = [v.numpy() for v in self.variables if id(v) not in theirs]
            self._left_out |= kernels
            self.rebuild(self._trainable_variables)
            self.__dict__.update(attributes)
            moments = (self._momentums, self._second_moments)
            new = {id(variables[i]) for variables in moments for i in changed}
            for variable, value in zip(
                [v for v in self.variables if id(v) not in new], values, strict=True
            ):
                variable.assign(value)

    def kernels_with_blocks(self) -> set[int]:
        """Identities of the kernels that have a Kronecker block, or had one once."""
        kernels = {block.kernel for block in self.blocks} | self._left_out
        return {id(self._trainable_variables[kernel]) for kernel in kernels}

    def has_waiting_state(self) -> bool:
        """Whether state was loaded that waits for the layers it belongs to.

        Whoever has trained since does without it.
        """
        stored = self._stored
        return stored is not None and stored.loaded_at == int(self._iterations.numpy())

    def _stored_left_out(self) -> frozenset[int]:
        """What `left_out` of the state that waits for `build` says."""
        return frozenset() if self._stored is None else frozenset(self._stored.left_out)

    def _take_waiting_state(self) -> None:
        """Takes over, after `build`, what was loaded before it."""
        stored, self._stored = self._stored, None
        if stored is not None:
            self._take_stored(stored)

    def _take_stored(self, stored: StoredState) -> None:
        variables = self.variables
        if self.built and not stored.built:
            variables = [v for v in variables if id(v) in self._before_build]
        if stored.blocks and not self.blocks:
            self._stored = stored
            warnings.warn(
                f"The stored state of optimizer '{self.name}' has Kronecker blocks for "
                f"{len(stored.blocks)} layers, but no layer of the model is instrumented: it was "
                "stripped, or its layers live in a class of your own. Call "
                "`keras_kfc.instrument(model)` before training, which loads the state; without "
                "it, factors and momenta are lost.",
                stacklevel=3,
            )
            return
        if len(variables) != len(stored.arrays):
            self._warn_of_skipping(
                f"it has {len(variables)} variables and {len(self.blocks)} Kronecker blocks, "
                f"whereas the stored state has {len(stored.arrays)} variables and "
                f"{len(stored.blocks)} blocks"
            )
            return
        for (path, *layout), (stored_path, *stored_layout) in zip(
            self._block_layout(), stored.blocks, strict=False
        ):
            if layout != stored_layout:
                raise ValueError(
                    f"The stored state of optimizer '{self.name}' belongs to other layers or "
                    f"settings. Expected kernel, bias and shapes of the factors {layout} for layer "
                    f"{path}. Received: {stored_layout} of layer {stored_path}"
                )
        roles = [_role(variable) for variable in variables]
        if roles != stored.roles:
            ours, theirs = next(
                pair for pair in zip(roles, stored.roles, strict=True) if pair[0] != pair[1]
            )
            raise ValueError(
                f"The stored state of optimizer '{self.name}' belongs to other settings. Expected "
                f"a variable for {ours}. Received: one for {theirs}"
            )
        for variable, array in zip(variables, stored.arrays, strict=True):
            if tuple(variable.shape) != array.shape:
                raise ValueError(
                    f"The stored state of optimizer '{self.name}' belongs to other layers or "
                    f"settings. Expected shape {tuple(variable.shape)} for {variable.path}. "
                    f"Received: shape {array.shape}"
                )
        # `build` may run while a train step is traced.
        with tf.init_scope():
            for variable, array in zip(variables, stored.arrays, strict=True):
                variable.assign(array)

    def _average_over_replicas(self) -> None:
        if count_replicas() > 1:
            for block in self.blocks:
                block.average_over_replicas()

    def _block_layout(self) -> list[list[Any]]:
        return [
            [
                block.path,
                block.kernel,
                block.bias,
                list(block.partition.omega_shape),
                list(block.partition.gamma_shape),
            ]
            for block in self.blocks
        ]

    def _roles(self) -> list[str]:
        return [_role(variable) for variable in self.variables]

    def _warn_of_skipping(self, reason: str) -> None:
        warnings.warn(
            f"Skipping variable loading for optimizer '{self.name}', because {reason}.",
            stacklevel=4,
        )


def _role(variable: keras.Variable) -> str:
    """What a variable of the optimizer is for: its name without that of its layer."""
    return next((role for role in _ROLES if variable.name.endswith(role)), variable.name)
