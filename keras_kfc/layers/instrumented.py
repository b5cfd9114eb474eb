"""Layers of Keras with an eye on their input and pre-activation.

They compute, save and configure exactly as Keras's own; they differ in
two ways. When a capture is open, they record what a Kronecker factor needs;
and their kernel variable carries a reference to them, from which the optimizer
learns which variables form a block.
"""

import functools
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_kfc._compat.keras_internals import layers_within
from keras_kfc._compat.layer_hooks import TellsWhenBuilt, kernel_of
from keras_kfc.layers.api import LayerKind
from keras_kfc.maps.api import LinearMap
from keras_kfc.passes.automatic import active_capture

# The classes that `keras_kfc.instrument` changes, and what it changes them to.
CAPTURING_CLASSES: dict[type, type] = {}
_PLAIN: dict[type, type] = {}


def instruments(plain: type) -> Callable[[type], type]:
    """Registers a class as the one that records what layers of a Keras class do.

    Args:
        plain: The Keras class.
    """

    def register(kind: type) -> type:
        CAPTURING_CLASSES[plain] = kind
        _PLAIN[kind] = plain
        return kind

    return register


class KroneckerLayer(TellsWhenBuilt):
    """What instrumented layers share: a layer kind is a subclass of this and of Keras's class."""

    # Whether Keras has a quantised form of the layer.
    can_be_quantised = False
    # The structure of the layer's curvature block, if it is not the optimizer's choice.
    curvature_structure: str | None = None

    built: bool
    quantization_mode: str | None

    def when_built(self) -> None:
        """Lets the kernel variable refer to the layer."""
        if self.quantization_mode is None:
            mark_kernel(self)

    @property
    def kronecker_kernel(self) -> keras.Variable:
        """The kernel variable itself, whatever `layer.kernel` derives from it."""
        return kernel_of(self)

    @property
    def linear_map(self) -> LinearMap:
        """How the layer's tensors map to Kronecker factors."""
        raise AttributeError(f"{type(self).__name__} does not define its linear_map")

    def quantize(self, *args: Any, **kwargs: Any) -> None:
        """Becomes Keras's own layer and is quantised as that, out of the optimizer's sight."""
        # A subclass keeps its class, and Keras refuses it.
        plain: Any = next(base for base in type(self).__mro__ if base in CAPTURING_CLASSES)
        _strip_and_quantize(self, functools.partial(plain.quantize, self), *args, **kwargs)

    def _observe(self, inputs: tf.Tensor, pre_activation: tf.Tensor) -> tf.Tensor:
        if not tf.is_tensor(pre_activation):
            return pre_activation
        capture = active_capture(self)
        return pre_activation if capture is None else capture.record(self, inputs, pre_activation)


_EXCLUDED: weakref.WeakSet[keras.Layer] = weakref.WeakSet()
# These call their children inside a loop of their own, out of a capture's reach.
_LOOPING = (keras.layers.TimeDistributed, keras.layers.RNN, keras.layers.Bidirectional)


def mark_kernel(layer: Any) -> None:
    """Lets a built layer's kernel variable refer to the layer."""
    layer.kronecker_kernel.kronecker_layer = weakref.ref(layer)


def unmark_kernel(layer: Any) -> None:
    """Undoes `mark_kernel`."""
    del layer.kronecker_kernel.kronecker_layer


def is_marked(layer: Any) -> bool:
    """Whether a layer is built and its kernel variable refers to a layer.

    Layers that share one kernel variable are all marked by the last of them.
    """
    return layer.built and layer_of_kernel(layer.kronecker_kernel) is not None


def layer_of_kernel(variable: Any) -> Any:
    """The instrumented layer that a variable is the kernel of, or None."""
    reference = getattr(variable, "kronecker_layer", None)
    return None if reference is None else reference()


def instrument_layer(layer: Any) -> None:
    """Gives one of Keras's layers its capturing subclass.

    Args:
        layer: A layer of a class in `CAPTURING_CLASSES`.
    """
    layer.__class__ = CAPTURING_CLASSES[type(layer)]
    if layer.built:
        mark_kernel(layer)
    # Keras binds this method to each instance, as it does with `build`: that of the
    # class would never run.
    layer.quantize = functools.partial(_strip_and_quantize, layer, layer.quantize)


def strip_layer(layer: Any) -> bool:
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
        bound: Any = vars(layer)["quantize"]
        if getattr(bound, "func", None) is _strip_and_quantize:
            vars(layer)["quantize"] = bound.args[1]
    return changed


def _strip_and_quantize(
    layer: Any, quantize: Callable[..., None], *args: Any, **kwargs: Any
) -> None:
    kind = type(layer)
    # Keras refuses subclasses.
    stripped = kind.can_be_quantised and kind in _PLAIN and strip_layer(layer)
    try:
        quantize(*args, **kwargs)
    except Exception:
        if stripped:
            layer.__class__ = kind
            if layer.built:
                mark_kernel(layer)
        raise


def layers_with_reasons(model: keras.Model) -> list[tuple[keras.Layer, str]]:
    """All layers inside a model, each with the reason why it cannot capture, if any."""
    looping: dict[int, str] = {}
    for layer in layers_within(model):
        if isinstance(layer, _LOOPING):
            for child in layers_within(layer, include_self=False):
                looping[id(child)] = f"inside {type(layer).__name__}"
    seen: set[int] = set()
    found: list[tuple[keras.Layer, str]] = []
    for layer in layers_within(model, include_self=False):
        if id(layer) not in seen:
            seen.add(id(layer))
            quantised = "quantised" if layer.quantization_mode else ""
            found.append((layer, looping.get(id(layer), quantised)))
    return found


def is_excluded(layer: keras.Layer) -> bool:
    """Whether somebody asked that the fallback rule trains a layer (`instrument`'s `exclude`)."""
    return layer in _EXCLUDED


def exclude_layer(layer: keras.Layer, excluded: bool) -> None:
    """Notes whether somebody asked that the fallback rule trains a layer."""
    (_EXCLUDED.add if excluded else _EXCLUDED.discard)(layer)


def parameter_groups(variables: Sequence[Any]) -> Iterator[tuple[int, LayerKind, int | None]]:
    """The Kronecker blocks that a list of trainable variables gives.

    Args:
        variables: The variables.

    Yields:
        The index of a kernel, its layer, and the index of the layer's bias, or None if no
        bias is among the variables.
    """
    indices = {id(variable): index for index, variable in enumerate(variables)}
    for index, variable in enumerate(variables):
        layer = layer_of_kernel(variable)
        if layer is not None:
            yield index, layer, None if layer.bias is None else indices.get(id(layer.bias))
