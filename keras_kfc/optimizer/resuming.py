"""How stored state finds its optimizer again, and how blocks come and go after `build`.

Keras stores optimizer variables by position and skips them, with a warning,
where their number differs. That would lose factors and momenta in three common
cases, for which the state waits here instead: the optimizer is not built yet;
it was stored before its first step; or it is the optimizer of a loaded model
whose layers live in a class of the user's own, and which `keras_kfc.instrument`
has still to give its blocks.
"""

import dataclasses
import warnings
from collections.abc import Sequence, Set
from typing import Any

import tensorflow as tf

from keras_kfc._compat.tensorflow_internals import outside_of_the_trace
from keras_kfc.curvature.block_diagonal import BlockDiagonal
from keras_kfc.layers.groups import parameter_groups
from keras_kfc.optimizer.archive import (
    StoredState,
    describe_blocks,
    read_state,
    roles_of,
    write_state,
)

# What an optimizer knows beside its variables and its configuration.
_KEPT = ("notices", "automatic_captures", "watched_steps")


@dataclasses.dataclass
class Waiting:
    """What an optimizer holds for a `build` to come.

    Args:
        stored: State that was loaded, or None.
        loaded_at: Batches that the optimizer had seen then.
        left_out: Indices of kernels that the fallback rule trains for want of statistics.
        before_build: Identities of the variables that were there before `build`.
    """

    stored: StoredState | None = None
    loaded_at: int = 0
    left_out: frozenset[int] = frozenset()
    before_build: frozenset[int] = frozenset()

    def all_left_out(self) -> frozenset[int]:
        """`left_out`, with what the state that waits has left out."""
        if self.stored is not None:
            self.left_out |= frozenset(self.stored.left_out)
        return self.left_out

    def is_fresh(self, batches: int) -> bool:
        """Whether state waits; whoever has trained since does without it."""
        return self.stored is not None and self.loaded_at == batches


def save(optimizer: Any, store: Any) -> None:
    """Stores all variables of an optimizer by position, and how they are laid out.

    Args:
        optimizer: The `keras_kfc.KFC`.
        store: Keras's store, a mapping from names to arrays.
    """
    if _waits(optimizer):
        # Nobody has trained with it: what was loaded is stored again.
        write_state(store, optimizer.waiting.stored)
        return
    curvature = _curvature_of(optimizer)
    state = StoredState(
        [variable.numpy() for variable in optimizer.variables],
        roles_of(optimizer.variables, curvature),
        describe_blocks(curvature),
        optimizer.built,
        sorted(optimizer.waiting.left_out),
    )
    write_state(store, state)


def load(optimizer: Any, store: Any) -> None:
    """Takes over variables from a store, all or none.

    Args:
        optimizer: The `keras_kfc.KFC`.
        store: Keras's store.

    Raises:
        ValueError: If the stored blocks have other shapes than this optimizer's, or the
            state has a newer format than this version reads.
    """
    waiting = optimizer.waiting
    waiting.stored, waiting.loaded_at = None, int(optimizer.batches.numpy())
    stored = read_state(store, optimizer.name)
    if stored is None:
        _warn_of_skipping(optimizer, "the stored state is that of another optimizer")
    elif optimizer.built and not waiting.left_out.issuperset(stored.left_out):
        waiting.stored = stored
        rebuild(optimizer, optimizer.trained_variables)
    elif optimizer.built or not stored.built:
        _take(optimizer, stored)
    else:
        waiting.stored = stored


def take_waiting(optimizer: Any) -> None:
    """Takes over, after `build`, what was loaded before it."""
    waiting = optimizer.waiting
    stored, waiting.stored = waiting.stored, None
    if stored is not None:
        _take(optimizer, stored)


def adopt(optimizer: Any, variables: Sequence[Any]) -> bool:
    """Builds an optimizer anew if its layers were instrumented since and no training is lost.

    Args:
        optimizer: The `keras_kfc.KFC`.
        variables: The trainable variables.

    Returns:
        Whether it has the blocks that a new optimizer would have.
    """
    if not optimizer.built:
        return True
    trained = optimizer.trained_variables
    kernels = {block.kernel_index for block in optimizer.blocks} | optimizer.waiting.left_out
    wanted = {id(group.matrix.kernel) for group in parameter_groups(variables)}
    if wanted == {id(trained[kernel]) for kernel in kernels}:
        return True
    if not (_waits(optimizer) or not optimizer.iterations.numpy()):
        return False
    rebuild(optimizer, variables)
    return True


def rebuild(optimizer: Any, variables: Sequence[Any], keep: Sequence[str] = ()) -> None:
    """Builds an optimizer anew, for layers that were instrumented after `build`.

    State that was loaded for these layers is taken over. All other state that
    `build` creates (factors, inverses, momenta) starts afresh.

    Args:
        optimizer: The `keras_kfc.KFC`.
        variables: The trainable variables.
        keep: Attributes that stay as they are.
    """
    waiting = optimizer.waiting
    if not _waits(optimizer):
        waiting.stored = None
    # A fresh optimizer in the place of this one: TensorFlow saves no object whose
    # tracked lists have lost an element.
    kept = {name: vars(optimizer)[name] for name in keep}
    with optimizer.in_strategy():
        fresh = type(optimizer).from_config(optimizer.get_config())
        vars(optimizer).update({**vars(fresh), **kept, "waiting": waiting})
        optimizer.build(variables)


def leave_out(optimizer: Any, kernels: Set[int]) -> None:
    """Lets the fallback rule train layers in place of their blocks; all else stays.

    May be called while a train step is traced, before it uses the optimizer's variables.

    Args:
        optimizer: The `keras_kfc.KFC`.
        kernels: Indices of the layers' kernels.
    """
    leaving = [block for block in optimizer.blocks if block.kernel_index in kernels]
    theirs = {id(variable) for block in leaving for variable in block.state.values()}
    changed = {index for block in leaving for index in block.indices.every}
    # Momentum is another thing to the fallback rule.
    theirs |= {id(optimizer.parts.momentums[i]) for i in changed}
    with outside_of_the_trace():
        values = [v.numpy() for v in optimizer.variables if id(v) not in theirs]
        optimizer.waiting.left_out |= kernels
        rebuild(optimizer, optimizer.trained_variables, _KEPT)
        moments = (optimizer.parts.momentums, optimizer.parts.second_moments)
        new = {id(variables[i]) for variables in moments for i in changed}
        kept = [v for v in optimizer.variables if id(v) not in new]
        for variable, value in zip(kept, values, strict=True):
            variable.assign(value)


def _waits(optimizer: Any) -> bool:
    """Whether loaded state waits for the layers it belongs to."""
    return optimizer.waiting.is_fresh(int(optimizer.batches.numpy()))


def _curvature_of(optimizer: Any) -> BlockDiagonal | None:
    return None if optimizer.parts is None else optimizer.parts.curvature


def _take(optimizer: Any, stored: StoredState) -> None:
    """Assigns stored values to the optimizer's variables, if they are for the same."""
    variables = optimizer.variables
    if optimizer.built and not stored.built:
        variables = [v for v in variables if id(v) in optimizer.waiting.before_build]
    if stored.blocks and not optimizer.blocks:
        optimizer.waiting.stored = stored
        warnings.warn(
            f"The stored state of optimizer '{optimizer.name}' has Kronecker blocks for "
            f"{len(stored.blocks)} layers, but no layer of the model is instrumented: it was "
            "stripped, or its layers live in a class of your own. Call "
            "`keras_kfc.instrument(model)` before training, which loads the state; without "
            "it, factors and momenta are lost.",
            stacklevel=4,
        )
        return
    if len(variables) != len(stored.arrays):
        _warn_of_skipping(
            optimizer,
            f"it has {len(variables)} variables and {len(optimizer.blocks)} Kronecker blocks, "
            f"whereas the stored state has {len(stored.arrays)} variables and "
            f"{len(stored.blocks)} blocks",
        )
        return
    _check(optimizer, stored, variables)
    # `build` may run while a train step is traced.
    with tf.init_scope():
        for variable, array in zip(variables, stored.arrays, strict=True):
            variable.assign(array)
        _forget_other_factors(optimizer, stored)


def _forget_other_factors(optimizer: Any, stored: StoredState) -> None:
    """Lets blocks measure their factors anew that were stored in another setting.

    Their numbers mean something else there, and are those of a few batches; momenta are not.
    """
    own = describe_blocks(_curvature_of(optimizer))
    for block, ours, theirs in zip(optimizer.blocks, own, stored.blocks, strict=False):
        # Before format 3 there was no "trace".
        same = ours["weight_sharing"] == theirs.get("weight_sharing", ours["weight_sharing"])
        if not same or (stored.version < 3 and ours["weight_sharing"] == "trace"):
            block.ema_weight.assign(0)
            block.has_inverses.assign(0)


def _check(optimizer: Any, stored: StoredState, variables: Sequence[Any]) -> None:
    """Raises a ValueError if stored state is for other layers or settings."""
    for own, theirs in zip(describe_blocks(_curvature_of(optimizer)), stored.blocks, strict=False):
        names = [name for name in own if name not in ("path", "weight_sharing")]
        ours, given = ([block.get(name) for name in names] for block in (own, theirs))
        if ours != given:
            raise _belongs_elsewhere(
                optimizer,
                f"structure, kernel, bias and shapes of the factors {ours} for layer {own['path']}",
                f"{given} of layer {theirs['path']}",
            )
    roles = stored.named(roles_of(variables, _curvature_of(optimizer)))
    if roles != stored.roles:
        pairs = zip(roles, stored.roles, strict=True)
        expected, received = next(pair for pair in pairs if pair[0] != pair[1])
        raise _belongs_elsewhere(optimizer, f"a variable for {expected}", f"one for {received}")
    for variable, array in zip(variables, stored.arrays, strict=True):
        if tuple(variable.shape) != array.shape:
            shape = f"shape {tuple(variable.shape)} for {variable.path}"
            raise _belongs_elsewhere(optimizer, shape, f"shape {array.shape}")


def _belongs_elsewhere(optimizer: Any, expected: str, received: str) -> ValueError:
    return ValueError(
        f"The stored state of optimizer '{optimizer.name}' belongs to other layers or settings. "
        f"Expected {expected}. Received: {received}"
    )


def _warn_of_skipping(optimizer: Any, reason: str) -> None:
    warnings.warn(
        f"Skipping variable loading for optimizer '{optimizer.name}', because {reason}.",
        stacklevel=5,
    )
