"""Makes any Keras model ready for KFC in place, and undoes it.

Layers change their class to the subclass that captures, and back; weights,
names, configuration and the graph of a functional model stay as they are.
"""

import contextlib
import logging
import math
from collections.abc import Iterable, Iterator
from typing import Any

import keras

from keras_kfc._compat.keras_internals import layers_within, own_trainable_variables
from keras_kfc.layers.coverage import Coverage, LayerCoverage
from keras_kfc.layers.instrumented import (
    CAPTURING_CLASSES,
    KroneckerLayer,
    capturing_class_of,
    exclude_layer,
    instrument_layer,
    is_marked,
    is_unmarked,
    layers_with_reasons,
    mark_kernels,
    strip_layer,
    unmark_kernels,
)
from keras_kfc.passes.automatic import kronecker_optimizer, unwatch_loss

_logger = logging.getLogger("keras_kfc")


def instrument(
    model: keras.Model, *, exclude: Iterable[str] = (), verbose: bool = False
) -> keras.Model:
    """Makes a Keras model ready for `keras_kfc.KFC`, in place.

    Every layer in the model, at any depth, that has a capturing subclass in
    `keras_kfc.layers`, such as `keras.layers.Dense`, becomes that. Calling it again changes
    nothing.
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
        if optimizer is not None and not optimizer.adopt(model.trainable_variables):
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
    inner = layers_with_reasons(model)
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
        for child in layers_within(layer)
    }
    changed = []
    for layer, reason in inner:
        exclude_layer(layer, id(layer) in left_out)
        if id(layer) in left_out or reason:
            if strip_layer(layer):
                changed.append(layer)
        elif capturing_class_of(type(layer)):
            instrument_layer(layer)
            changed.append(layer)
        elif is_unmarked(layer):
            mark_kernels(layer)
            changed.append(layer)
    return changed


@contextlib.contextmanager
def temporarily_instrumented(model: keras.Model) -> Iterator[None]:
    """Instruments a model's layers for the time being, whatever they were before.

    Args:
        model: The model.

    Raises:
        TypeError: If `model` is not a Keras model.
    """
    _require_model(model)
    before = [
        (layer, type(layer), isinstance(layer, KroneckerLayer) and is_marked(layer))
        for layer, _ in layers_with_reasons(model)
    ]
    instrument_layers(model)
    try:
        yield
    finally:
        for layer, kind, marked in before:
            if isinstance(layer, KroneckerLayer) and is_marked(layer) and not marked:
                unmark_kernels(layer)
            if type(layer) is not kind:
                strip_layer(layer)
                if type(layer) is not kind:
                    instrument_layer(layer)
            if marked and not is_marked(layer):
                mark_kernels(layer)


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
    if any([strip_layer(layer) for layer, _ in layers_with_reasons(model)]):
        _forget_traces(model)
    unwatch_loss(model)
    return model


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
    for layer, reason in layers_with_reasons(model):
        own = own_trainable_variables(layer)
        if layer.built and not own:
            continue
        if not layer.built and not isinstance(layer, tuple(CAPTURING_CLASSES)):
            continue
        reason = reason or _reason_without_block(layer)
        count = sum(math.prod(variable.shape) for variable in own) if layer.built else None
        path = layer.path or layer.name  # layers have no path before they are built
        entries.append(LayerCoverage(path, type(layer).__name__, count, not reason, reason))
    return Coverage(entries)


def _reason_without_block(layer: keras.Layer) -> str:
    """Why the fallback rule trains a layer that a capture could reach, or an empty string."""
    if isinstance(layer, KroneckerLayer):
        if not layer.built:
            return ""
        if not layer.weight_matrices:
            return layer.without_matrices
        if not is_marked(layer):
            return "excluded"
        frozen = not any(matrix.kernel.trainable for matrix in layer.weight_matrices)
        return "its kernel is frozen" if frozen else ""
    if capturing_class_of(type(layer)):
        return "not instrumented (call keras_kfc.instrument)"
    if isinstance(layer, tuple(CAPTURING_CLASSES)):
        return "a subclass may compute something else"
    return "no block for this class"


def _forget_traces(model: keras.Model) -> None:
    """Drops functions traced with the former classes."""
    model.train_function = model.test_function = model.predict_function = None


def _require_model(model: Any) -> None:
    if not isinstance(model, keras.Model):
        raise TypeError(
            "Argument `model` must be an instance of `keras.Model`. Received: "
            f"model={model!r} of type {type(model).__name__}"
        )
