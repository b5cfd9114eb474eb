"""Layers of Keras with an eye on their input and pre-activation.

They compute, save and configure exactly as Keras's own; they differ in
two ways. When a capture is open, they record what a Kronecker factor needs;
and their kernel variables carry a reference to them, from which the optimizer
learns which variables form a block.
"""

import functools
import weakref
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from keras_kfc._compat.keras_internals import layers_within
from keras_kfc._compat.layer_hooks import TellsWhenBuilt, kernel_of
from keras_kfc.maps.api import LinearMap
from keras_kfc.maps.weights import WeightMatrix
from keras_kfc.passes.automatic import active_capture, open_for_weights
from keras_kfc.passes.masks import positions_of

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
    # Why a layer of the kind has no block, if it has no matrix.
    without_matrices = "its weights are no matrix"
    # The structure of the layer's curvature block, if it is not the optimizer's choice.
    curvature_structure: str | None = None
    # As in `WeightMatrix`, or None for what suits the matrix.
    weight_sharing: str | None = None

    built: bool
    path: str
    bias: keras.Variable | None
    quantization_mode: str | None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the layer, in sight of those who differentiate with regard to its weights."""
        if self.built and is_marked(self):
            open_for_weights(self.weight_matrices[0].kernel)
        return super().__call__(*args, **kwargs)  # type: ignore[misc]

    def when_built(self) -> None:
        """Lets the kernel variables refer to the layer."""
        if self.quantization_mode is None:
            mark_kernels(self)

    @property
    def kronecker_kernel(self) -> keras.Variable:
        """The kernel variable itself, whatever `layer.kernel` derives from it."""
        return kernel_of(self)

    @property
    def linear_map(self) -> LinearMap:
        """How the layer's tensors map to Kronecker factors, if it has one matrix."""
        raise AttributeError(f"{type(self).__name__} does not define its linear_map")

    @property
    def weight_matrices(self) -> tuple[WeightMatrix, ...]:
        """The layer's matrices: one of `kronecker_kernel` and bias, unless a kind has others."""
        return (self._matrix(self.kronecker_kernel, self.bias, self.linear_map),)

    def _matrix(
        self, kernel: Any, bias: Any, linear_map: LinearMap, name: str = ""
    ) -> WeightMatrix:
        """A matrix with the layer's choices of structure and setting."""
        # Patches are many and large; what sees the inputs themselves can do without assumptions.
        sees_patches = linear_map.kernel_rows > linear_map.inputs // linear_map.groups
        sharing = self.weight_sharing or ("expand" if sees_patches else "trace")
        return WeightMatrix(kernel, bias, linear_map, name, self.curvature_structure, sharing)

    def quantize(self, *args: Any, **kwargs: Any) -> None:
        """Becomes Keras's own layer and is quantised as that, out of the optimizer's sight."""
        # A subclass keeps its class, and Keras refuses it.
        plain: Any = next(base for base in type(self).__mro__ if base in CAPTURING_CLASSES)
        _strip_and_quantize(self, functools.partial(plain.quantize, self), *args, **kwargs)

    def _observe(
        self,
        inputs: Any,
        pre_activation: tf.Tensor,
        matrix: int = 0,
        mask: tf.Tensor | None = None,
    ) -> tf.Tensor:
        """Shows an open capture what one of the layer's matrices did.

        Args:
            inputs: What the matrix was multiplied by, or a function that computes it.
            pre_activation: The product, with the bias.
            matrix: Which one of `weight_matrices`.
            mask: Which positions count, if Keras's mask of the inputs does not tell.

        Returns:
            What to go on with in the place of `pre_activation`.
        """
        if not tf.is_tensor(pre_activation):
            return pre_activation
        weights = self.weight_matrices[matrix]
        capture = active_capture(weights.kernel)
        if capture is None:
            return pre_activation
        if mask is None and weights.linear_map.keeps_positions:
            mask = positions_of(inputs)
        return capture.record(self.path, weights, inputs, pre_activation, mask)


_EXCLUDED: weakref.WeakSet[keras.Layer] = weakref.WeakSet()
# The classes of layers before they were instrumented.
_ORIGINAL: weakref.WeakKeyDictionary[keras.Layer, type] = weakref.WeakKeyDictionary()


def capturing_class_of(kind: type) -> type | None:
    """The class that layers of a class of Keras get, or None.

    A subclass of another library of Keras's that adds nothing, as keras_hub has them, counts as the
    class itself. A user's own keeps its name in files.
    """
    for base in kind.__mro__:
        if base in CAPTURING_CLASSES:
            return CAPTURING_CLASSES[base]
        adds = any(not name.startswith(("__", "_api")) for name in vars(base))
        if adds or not base.__module__.startswith("keras_"):
            return None
    return None


def mark_kernels(layer: Any) -> None:
    """Lets a built layer's kernel variables refer to the layer."""
    for matrix in layer.weight_matrices:
        matrix.kernel.kronecker_layer = weakref.ref(layer)


def unmark_kernels(layer: Any) -> None:
    """Undoes `mark_kernels`."""
    for matrix in layer.weight_matrices:
        vars(matrix.kernel).pop("kronecker_layer", None)


def is_marked(layer: Any) -> bool:
    """Whether a layer is built and its kernel variables refer to a layer.

    Layers that share one kernel variable are all marked by the last of them.
    """
    return layer.built and any(
        layer_of_kernel(matrix.kernel) is not None for matrix in layer.weight_matrices
    )


def is_unmarked(layer: Any) -> bool:
    """Whether a layer of a capturing class is built, and its kernel variables refer to none."""
    kronecker = isinstance(layer, KroneckerLayer) and layer.built
    return kronecker and bool(layer.weight_matrices) and not is_marked(layer)


def layer_of_kernel(variable: Any) -> Any:
    """The instrumented layer that a variable is the kernel of, or None."""
    reference = getattr(variable, "kronecker_layer", None)
    return None if reference is None else reference()


def instrument_layer(layer: Any) -> None:
    """Gives one of Keras's layers its capturing subclass.

    Args:
        layer: A layer that `capturing_class_of` has a class for.
    """
    kind = capturing_class_of(type(layer))
    if kind is None:
        raise TypeError(f"There is no capturing class for {type(layer).__name__}")
    _ORIGINAL[layer] = type(layer)
    layer.__class__ = kind
    if layer.built:
        mark_kernels(layer)
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
        unmark_kernels(layer)
    if type(layer) in _PLAIN:
        layer.__class__ = _ORIGINAL.pop(layer, _PLAIN[type(layer)])
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
                mark_kernels(layer)
        raise


def layers_with_reasons(model: keras.Model) -> list[tuple[keras.Layer, str]]:
    """All layers inside a model, each with the reason why it cannot capture, if any."""
    looping: dict[int, str] = {}
    for layer in layers_within(model):
        # It calls what couples examples step by step, in a loop that may be a graph of its own.
        if isinstance(layer, keras.layers.TimeDistributed) and couples_examples(layer.layer):
            for child in layers_within(layer, include_self=False):
                looping[id(child)] = f"inside {type(layer).__name__}, and may couple examples"
    seen: set[int] = set()
    found: list[tuple[keras.Layer, str]] = []
    for layer in layers_within(model, include_self=False):
        if id(layer) not in seen:
            seen.add(id(layer))
            quantised = "quantised" if layer.quantization_mode else ""
            found.append((layer, looping.get(id(layer), quantised)))
    return found


def couples_examples(layer: keras.Layer) -> bool:
    """Whether a layer may do something else to a batch than to its examples one by one.

    Batch normalisation does, and layers of a user's own may.
    """
    known = ("keras.", "keras_kfc.")
    return any(
        isinstance(own, keras.layers.BatchNormalization)
        or not type(own).__module__.startswith(known)
        for own in layers_within(layer)
    )


def is_excluded(layer: keras.Layer) -> bool:
    """Whether somebody asked that the fallback rule trains a layer (`instrument`'s `exclude`)."""
    return layer in _EXCLUDED


def exclude_layer(layer: keras.Layer, excluded: bool) -> None:
    """Notes whether somebody asked that the fallback rule trains a layer."""
    (_EXCLUDED.add if excluded else _EXCLUDED.discard)(layer)
