"""Makes any Keras model ready for KFC in place, and undoes it.

Layers change their class to the subclass that captures, and back; weights,
names, configuration and the graph of a functional model stay as they are.
"""

import contextlib
import dataclasses
import io
import logging
import math
from collections.abc import Iterable, Iterator
from typing import Any

import keras
from rich.console import Console
from rich.table import Table

from keras_kfc import layers
from keras_kfc.layers import KroneckerLayer, is_marked, mark_kernel, unmark_kernel
from keras_kfc.pending import kronecker_optimizer, unwatch_loss

_logger = logging.getLogger("keras_kfc")

_INSTRUMENTED = {keras.layers.Conv2D: layers.Conv2D, keras.layers.Dense: layers.Dense}
_PLAIN = {instrumented: plain for plain, instrumented in _INSTRUMENTED.items()}
# These call their children inside a loop of their own, out of a capture's reach.
_LOOPING = (keras.layers.TimeDistributed, keras.layers.RNN, keras.layers.Bidirectional)


@dataclasses.dataclass(frozen=True)
class LayerCoverage:
    """How KFC trains one layer.

    Args:
        path: The layer's path.
        kind: Name of its class.
        parameters: Number of its trainable parameters, or None if it is not built.
        covered: Whether it has a Kronecker block.
        reason: Why not, or an empty string.
    """

    path: str
    kind: str
    parameters: int | None
    covered: bool
    reason: str


class Coverage:
    """Which layers of a model have a Kronecker block; prints as a table.

    Args:
        entries: One `LayerCoverage` for each layer with trainable weights.

    Attributes:
        entries: As given.
    """

    def __init__(self, entries: Iterable[LayerCoverage]):
        self.entries = tuple(entries)

    @property
    def covered(self) -> list[str]:
        """Paths of the layers that have a Kronecker block."""
        return [entry.path for entry in self.entries if entry.covered]

    @property
    def fallback(self) -> dict[str, str]:
        """Paths of the layers that the fallback rule trains, with the reason."""
        return {entry.path: entry.reason for entry in self.entries if not entry.covered}

    def __str__(self) -> str:
        table = Table(title="KFC coverage")
        for heading in ("layer", "class", "parameters", "trained by"):
            table.add_column(heading, justify="right" if heading == "parameters" else "left")
        for entry in self.entries:
            count = "?" if entry.parameters is None else f"{entry.parameters:,}"
            rule = "Kronecker block" if entry.covered else f"fallback rule: {entry.reason}"
            table.add_row(entry.path, entry.kind, count, rule)
        sizes = [(entry.covered, entry.parameters or 0) for entry in self.entries]
        share = sum(size for covered, size in sizes if covered) / max(1, sum(s for _, s in sizes))
        table.caption = (
            f"{len(self.covered)} of {len(self.entries)} layers and {share:.1%} of the parameters "
            "have a Kronecker block"
        )
        output = io.StringIO()
        Console(file=output, width=140).print(table)
        return output.getvalue().rstrip()

    __repr__ = __str__


def instrument(
    model: keras.Model, *, exclude: Iterable[str] = (), verbose: bool = False
) -> keras.Model:
    """Makes a Keras model ready for `keras_kfc.KFC`, in place.

    Every `keras.layers.Conv2D` and `keras.layers.Dense` in the model, at any
    depth, becomes its capturing subclass. Calling it again changes nothing.
    `keras_kfc.coverage(model)` tells the outcome.

    Args:
        model: The model, built or not, compiled or not.
        exclude: Names or paths of layers to leave to the fallback rule, with
            all that is inside them.
        verbose: Whether to print the coverage.

    Returns:
        The same model.

    Raises:
        TypeError: If `model` is not a Keras model, or `exclude` not an iterable
            of strings.
        ValueError: If `exclude` names a layer that the model does not have.

    Example:

    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2, name="head")])
    >>> keras_kfc.coverage(keras_kfc.instrument(model)).covered
    ['sequential/head']
    """
    if instrument_layers(model, exclude):
        _forget_traces(model)
        optimizer = kronecker_optimizer(getattr(model, "optimizer", None))
        if getattr(optimizer, "built", False):
            if optimizer.has_waiting_state() or not optimizer.iterations.numpy():
                optimizer.rebuild(model.trainable_variables)
            else:
                _logger.warning(
                    "The optimizer of %s was built before `instrument` changed its layers, and "
                    "keeps its blocks. Compile the model again with a new optimizer.",
                    type(model).__name__,
                )
    if verbose:
        print(coverage(model))
    return model


def instrument_layers(model: keras.Model, exclude: Iterable[str] = ()) -> list[keras.Layer]:
    """Changes the classes of layers as `instrument` does, and no more.

    Args:
        model: The model.
        exclude: Names or paths of layers to leave to the fallback rule.

    Returns:
        The layers whose class changed.
    """
    _require_model(model)
    if isinstance(exclude, str):
        exclude = [exclude]
    names: list[Any]
    try:
        names = list(exclude)
    except TypeError:
        names = [exclude]
    if not all(isinstance(name, str) for name in names):
        raise TypeError(
            "Argument `exclude` must be an iterable of names or paths of layers. "
            f"Received: exclude={exclude!r} of type {type(exclude).__name__}"
        )
    excluded = set(names)
    inner = _layers_of(model)
    unknown = excluded - {name for layer, _ in inner for name in (layer.name, layer.path)}
    if unknown:
        raise ValueError(
            "Argument `exclude` must hold names or paths of the model's layers. "
            f"Received: exclude={sorted(excluded)}, of which the model lacks {sorted(unknown)}"
        )
    left_out = {
        id(child)
        for layer, _ in inner
        if {layer.name, layer.path} & excluded
        for child in layer._flatten_layers()
    }
    changed = []
    for layer, reason in inner:
        if id(layer) in left_out or reason:
            if strip_layer(layer):
                changed.append(layer)
        elif type(layer) in _INSTRUMENTED:
            layer.__class__ = _INSTRUMENTED[type(layer)]
            if layer.built:
                mark_kernel(layer)
            changed.append(layer)
        elif isinstance(layer, KroneckerLayer) and layer.built and not is_marked(layer):
            mark_kernel(layer)
            changed.append(layer)
    return changed


@contextlib.contextmanager
def instrumented(model: keras.Model) -> Iterator[None]:
    """Instruments a model's layers for the time being, whatever they were before.

    Args:
        model: The model.

    Raises:
        TypeError: If `model` is not a Keras model.
    """
    _require_model(model)
    before = [
        (layer, type(layer), isinstance(layer, KroneckerLayer) and is_marked(layer))
        for layer, _ in _layers_of(model)
    ]
    instrument_layers(model)
    try:
        yield
    finally:
        for layer, kind, marked in before:
            if isinstance(layer, KroneckerLayer) and is_marked(layer) and not marked:
                unmark_kernel(layer)
            if type(layer) is not kind:
                layer.__class__ = kind
            if marked and not is_marked(layer):
                mark_kernel(layer)


def strip(model: keras.Model) -> keras.Model:
    """Undoes `instrument`, in place.

    Layers of `keras_kfc.layers` become Keras's own, so that the model can be
    exported, and saved and loaded, where keras_kfc is not installed. A model
    that was compiled with `keras_kfc.KFC` is saved with it: load it there with
    `compile=False`, or compile it with another optimizer before.

    Args:
        model: The model.

    Returns:
        The same model.

    Raises:
        TypeError: If `model` is not a Keras model.
    """
    _require_model(model)
    if any([strip_layer(layer) for layer, _ in _layers_of(model)]):
        _forget_traces(model)
    unwatch_loss(model)
    return model


def strip_layer(layer: keras.Layer) -> bool:
    """Takes one layer's block away, and gives it Keras's own class back.

    A subclass of a capturing layer keeps its class.

    Args:
        layer: Any layer.

    Returns:
        Whether anything changed.
    """
    if not isinstance(layer, KroneckerLayer):
        return False
    changed = is_marked(layer)
    if changed:
        unmark_kernel(layer)
    if type(layer) in _PLAIN:
        layer.__class__ = _PLAIN[type(layer)]
        changed = True
    return changed


def coverage(model: keras.Model) -> Coverage:
    """Tells how KFC would train each layer of a model.

    Args:
        model: The model.

    Returns:
        A `Coverage`, which prints as a table.

    Raises:
        TypeError: If `model` is not a Keras model.
    """
    _require_model(model)
    entries = []
    for layer, reason in _layers_of(model):
        own = [variable for variable in layer._trainable_variables]
        if layer.built and not own:
            continue
        if not layer.built and not isinstance(layer, (keras.layers.Conv2D, keras.layers.Dense)):
            continue
        reason = reason or _reason_without_block(layer)
        count = sum(math.prod(variable.shape) for variable in own) if layer.built else None
        path = layer.path or layer.name  # layers have no path before they are built
        entries.append(LayerCoverage(path, type(layer).__name__, count, not reason, reason))
    return Coverage(entries)


def _reason_without_block(layer):
    """Why the fallback rule trains a layer that a capture could reach, or an empty string."""
    if isinstance(layer, KroneckerLayer):
        if not layer.built:
            return ""
        if not is_marked(layer):
            return "excluded"
        return "" if layer.kronecker_kernel.trainable else "its kernel is frozen"
    if type(layer) in _INSTRUMENTED:
        return "not instrumented (call keras_kfc.instrument)"
    if isinstance(layer, tuple(_INSTRUMENTED)):
        return "a subclass may compute something else"
    return "no block for this class"


def _layers_of(model):
    """All layers inside a model, each with the reason why it cannot capture, if any."""
    looping: dict[int, str] = {}
    for layer in model._flatten_layers():
        if isinstance(layer, _LOOPING):
            for child in layer._flatten_layers(include_self=False):
                looping[id(child)] = f"inside {type(layer).__name__}"
    seen: set[int] = set()
    found = []
    for layer in model._flatten_layers(include_self=False):
        if id(layer) not in seen:
            seen.add(id(layer))
            found.append((layer, looping.get(id(layer), "")))
    return found


def _forget_traces(model):
    """Drops functions traced with the former classes."""
    model.train_function = model.test_function = model.predict_function = None


def _require_model(model):
    if not isinstance(model, keras.Model):
        raise TypeError(
            "Argument `model` must be an instance of `keras.Model`. Received: "
            f"model={model!r} of type {type(model).__name__}"
        )
