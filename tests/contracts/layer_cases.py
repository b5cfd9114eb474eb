"""The layer kinds that `test_layer_kinds` runs over: a line for each, or several."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np
import pytest
from helpers import few

import keras_kfc

# Wrappers whose matrices are those of layers inside.
NO_MATRICES = (
    *("RNN", "SimpleRNN", "LSTM", "GRU", "ConvLSTM1D", "ConvLSTM2D", "ConvLSTM3D"),
    *("TimeDistributed", "Bidirectional"),
)


# Layers that others hold.
CELLS = ("SimpleRNNCell", "LSTMCell", "GRUCell", "ConvLSTMCell")


@dataclasses.dataclass(frozen=True)
class Case:
    """A layer.

    Args:
        kind: Name of its class.
        options: Arguments; a function is called with the library of layers for one.
        shape: Shape of an example.
        tokens: Number of different integers that inputs are, or None for numbers.
        tolerance: Of relative errors in float64.
    """

    kind: str
    options: Mapping[str, Any]
    shape: tuple[int, ...]
    tokens: int | None = None
    tolerance: float = 1e-11

    def __str__(self) -> str:
        parts = [f"{k}={v}" for k, v in self.options.items() if not callable(v)]
        return f"{self.kind}({', '.join(parts)})"


def _cases(kind, shape, *several, tokens=None):
    return [Case(kind, options, shape, tokens) for options in several]


CASES = [
    *_cases("Conv1D", (7, 2), {"filters": 4, "kernel_size": 3}),
    *_cases(
        *("Conv1D", (7, 6)),
        {"filters": 4, "kernel_size": 2, "strides": 2, "padding": "same", "groups": 2},
        {"filters": 3, "kernel_size": 3, "dilation_rate": 2, "padding": "causal"},
    ),
    *_cases(
        *("Conv2D", (6, 5, 4)),
        {"filters": 4, "kernel_size": (3, 2)},
        {"filters": 4, "kernel_size": 3, "strides": 2, "padding": "same", "groups": 2},
        {"filters": 3, "kernel_size": 2, "dilation_rate": 2, "use_bias": False},
    ),
    *_cases(
        *("Conv3D", (4, 5, 3, 2)),
        {"filters": 4, "kernel_size": (2, 3, 2)},
        {"filters": 4, "kernel_size": 3, "strides": (2, 1, 2), "padding": "same"},
        {"filters": 4, "kernel_size": (3, 1, 2), "groups": 2, "padding": "same"},
        {"filters": 3, "kernel_size": 2, "dilation_rate": 2, "use_bias": False},
    ),
    *_cases(
        *("Conv1DTranspose", (5, 2)),
        {"filters": 3, "kernel_size": 3, "strides": 2, "padding": "same"},
        {"filters": 3, "kernel_size": 4, "strides": 3, "output_padding": 1},
        {"filters": 3, "kernel_size": 2, "strides": 3, "padding": "same"},
        {"filters": 3, "kernel_size": 5, "strides": 2, "padding": "same", "output_padding": 0},
    ),
    *_cases(
        *("Conv2DTranspose", (4, 3, 2)),
        {"filters": 3, "kernel_size": (3, 2), "strides": 2, "padding": "same"},
        {"filters": 3, "kernel_size": 2, "strides": (1, 3), "use_bias": False},
        {"filters": 3, "kernel_size": 3, "strides": 2, "padding": "same", "output_padding": 1},
    ),
    *_cases(
        *("Conv3DTranspose", (2, 3, 2, 2)),
        {"filters": 3, "kernel_size": (3, 2, 1), "strides": 2, "padding": "same"},
    ),
    *_cases(
        *("DepthwiseConv1D", (7, 3)),
        {"kernel_size": 3, "depth_multiplier": 2},
        {"kernel_size": 3, "strides": 2, "padding": "same", "use_bias": False},
    ),
    *_cases(
        *("DepthwiseConv2D", (6, 5, 3)),
        {"kernel_size": (3, 2), "depth_multiplier": 2},
        {"kernel_size": 3, "strides": 2, "padding": "same"},
        {"kernel_size": (2, 3), "dilation_rate": 2, "padding": "same", "use_bias": False},
    ),
    *_cases("SeparableConv1D", (7, 3), {"filters": 4, "kernel_size": 3, "depth_multiplier": 2}),
    *_cases(
        *("SeparableConv2D", (6, 5, 3)),
        {"filters": 4, "kernel_size": 3, "depth_multiplier": 2},
        {"filters": 4, "kernel_size": 3, "strides": 2, "padding": "same", "use_bias": False},
    ),
    *_cases("Dense", (5, 4), {"units": 3}, {"units": 3, "use_bias": False}),
    *_cases("Dense", (4,), {"units": 3}),
    *_cases(
        *("EinsumDense", (4, 5)),
        {"equation": "abc,cde->abde", "output_shape": (4, 2, 3), "bias_axes": "de"},
        {"equation": "...x,xy->...y", "output_shape": 4},
        {"equation": "abc,bcd->adb", "output_shape": (3, 4), "bias_axes": "db"},
        {"equation": "abc,bd->adc", "output_shape": (4, 5)},
        # A bias that all heads share has no place in the block.
        {"equation": "abc,cde->abde", "output_shape": (None, 2, 3), "bias_axes": "e"},
    ),
    *_cases(
        *("EinsumDense", (4, 2, 3)),
        {"equation": "abcd,cde->abe", "output_shape": (None, 3), "bias_axes": "e"},
    ),
    *_cases(
        *("Embedding", (4,)),
        {"input_dim": 7, "output_dim": 3},
        {"input_dim": 7, "output_dim": 3, "mask_zero": True},
        tokens=7,
    ),
    *_cases(
        *("ReversibleEmbedding", (4,)),
        {"input_dim": 7, "output_dim": 3},
        {"input_dim": 7, "output_dim": 3, "mask_zero": True},
        tokens=7,
    ),
    *_cases(*("BatchNormalization", (4, 3)), {}, {"axis": 1}, {"scale": False}, {"center": False}),
    *_cases(
        *("LayerNormalization", (4, 3)),
        {},
        {"axis": 1},
        {"axis": [1, 2]},
        {"scale": False},
        {"center": False},
    ),
    *_cases("RMSNormalization", (4, 3), {}),
    *_cases("GroupNormalization", (3, 4), {"groups": 2}, {"groups": 3, "axis": 1}, {"groups": -1}),
    *_cases("PReLU", (4, 3), {}, {"shared_axes": [1]}, {"shared_axes": [2]}),
    *_cases(
        *("SimpleRNN", (5, 2)),
        {"units": 3},
        {"units": 3, "return_sequences": True, "go_backwards": True, "dropout": 0.4},
    ),
    *_cases(
        *("LSTM", (5, 2)),
        {"units": 3},
        {"units": 3, "return_sequences": True, "go_backwards": True, "use_bias": False},
        {"units": 3, "unroll": True, "implementation": 1},
        {"units": 3, "implementation": 1, "dropout": 0.4, "recurrent_dropout": 0.3},
    ),
    *_cases(
        *("GRU", (5, 2)),
        {"units": 3},
        {"units": 3, "reset_after": False, "return_sequences": True},
        {"units": 3, "reset_after": False, "dropout": 0.4, "recurrent_dropout": 0.3},
        {"units": 3, "recurrent_dropout": 0.3, "use_bias": False},
    ),
    *_cases(
        *("RNN", (5, 2)),
        {"cell": lambda library: [library.LSTMCell(3), library.GRUCell(2)]},
        {"cell": lambda library: library.SimpleRNNCell(3), "return_sequences": True},
    ),
    *_cases("ConvLSTM1D", (3, 4, 2), {"filters": 2, "kernel_size": 3, "padding": "same"}),
    *_cases(
        *("ConvLSTM2D", (3, 4, 4, 2)),
        {"filters": 2, "kernel_size": (3, 2), "strides": 2, "padding": "same"},
        {"filters": 2, "kernel_size": 2, "dilation_rate": 2, "return_sequences": True},
    ),
    *_cases("ConvLSTM3D", (3, 3, 3, 3, 1), {"filters": 2, "kernel_size": (2, 1, 2)}),
    *_cases(
        *("TimeDistributed", (3, 4, 2)),
        {"layer": lambda library: library.Dense(3)},
        {"layer": lambda library: library.LSTM(3)},
        {"layer": lambda library: library.Conv1D(3, 2)},
    ),
]


def build(case, policy="float64", library=keras.layers, instrumented=True):
    """A model of the layer alone, with random weights, and inputs of four examples.

    Args:
        case: The case.
        policy: Dtype policy of the layer.
        library: Where the layer's class is from.
        instrumented: Whether to call `keras_kfc.instrument`.
    """
    keras.utils.set_random_seed(3)
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try:
        options = {k: v(library) if callable(v) else v for k, v in case.options.items()}
        layer = getattr(library, case.kind)(**options)
        numbers = "float64" if policy == "float64" else "float32"
        dtype = numbers if case.tokens is None else "int32"
        inputs = keras.Input(case.shape, dtype=dtype)
        model = keras.Model(inputs, layer(inputs))
    finally:
        keras.config.set_dtype_policy(before)
    if instrumented:
        keras_kfc.instrument(model)
    rng = np.random.default_rng(0)
    for variable in model.trainable_variables:
        variable.assign(0.5 * rng.normal(size=variable.shape))
    if case.tokens is not None:
        return model, rng.integers(0, case.tokens, (4, *case.shape)).astype("int32")
    return model, rng.normal(size=(4, *case.shape)).astype(numbers)


first_of_each = {case.kind: case for case in reversed(CASES)}
# Kinds that differ most are quick tests, their first cases.
QUICK = ("LSTM", "Conv2D", "Conv2DTranspose", "DepthwiseConv2D", "EinsumDense", "Embedding")
QUICK += ("BatchNormalization", "TimeDistributed")
quick = [first_of_each[kind] for kind in QUICK]
every = pytest.mark.parametrize(
    "case", few([*quick, *(case for case in CASES if case not in quick)], len(quick)), ids=str
)
firsts = [*quick, *(case for case in first_of_each.values() if case not in quick)]
one_of_each = pytest.mark.parametrize("case", few(firsts, len(quick)), ids=str)
