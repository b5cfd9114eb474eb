"""Kronecker factors as pictures: heat maps and spectra, one PNG for each layer.

Needs matplotlib, which `pip install keras-kfc[pictures]` brings.
"""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np

from keras_kfc.curvature import KroneckerFactors
from keras_kfc.pending import kronecker_optimizer

# Eigenvalues below this share of the largest are rounding errors of float32.
_ROUNDING = 1e-8


@dataclasses.dataclass(frozen=True)
class _Layer:
    """What is drawn of one layer: factors `(blocks, n, n)`, and their damped inverses if known."""

    path: str
    factors: dict[str, np.ndarray]
    inverses: dict[str, np.ndarray]


def draw_factors(
    source: keras.Model | keras.optimizers.Optimizer | Mapping[str, KroneckerFactors],
    directory: str | pathlib.Path,
) -> list[pathlib.Path]:
    """Draws the factors of every layer as heat maps, and their eigenvalues.

    A picture shows omega and gamma, red above zero and blue below, entries outside of
    diagonal blocks in grey; and on the right the eigenvalues of each factor from the
    largest to the smallest, over their mean, with those of the damped factor dashed where
    an optimizer is drawn. Layers that have seen no data are left out.

    Args:
        source: A `keras_kfc.KFC`, a model compiled with one, or what
            `keras_kfc.kronecker_factors` returns.
        directory: The folder to draw into, made if it is missing.

    Returns:
        The files, `{layer path with underscores}.png`, one for each layer.

    Raises:
        TypeError: If `source` is nothing of that.
        ImportError: If matplotlib is missing.

    Example:

    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2, name="head")])
    >>> factors = keras_kfc.kronecker_factors(model, np.eye(4), loss="mse")
    >>> import tempfile
    >>> [file.name for file in keras_kfc.pictures.draw_factors(factors, tempfile.mkdtemp())]
    ['sequential_head.png']
    """
    require_matplotlib()
    layers = _layers_in(source)
    directory = pathlib.Path(directory)
    if layers:
        directory.mkdir(parents=True, exist_ok=True)
    return [_draw(layer, directory) for layer in layers]


def require_matplotlib() -> None:
    """Makes sure that matplotlib is there.

    Raises:
        ImportError: If it is missing, with the command that installs it.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "Pictures of factors need matplotlib. Install it with "
            "`pip install keras-kfc[pictures]` or `pip install matplotlib`."
        ) from error


def _layers_in(source: Any) -> list[_Layer]:
    if isinstance(source, Mapping) and all(
        isinstance(factors, KroneckerFactors) for factors in source.values()
    ):
        return [
            _Layer(path, {name: _stack(getattr(f, name)) for name in ("omega", "gamma")}, {})
            for path, f in source.items()
        ]
    if isinstance(source, keras.Model):
        source = getattr(source, "optimizer", None)
    optimizer = kronecker_optimizer(source)
    if optimizer is None:
        raise TypeError(
            "Argument `source` must be a `keras_kfc.KFC`, a model compiled with one, or the result "
            f"of `keras_kfc.kronecker_factors`. Received: source={source!r} of type "
            f"{type(source).__name__}"
        )
    layers = []
    for block in optimizer.blocks:
        if block.weight.numpy() > 0:
            inverses = {"omega": block.omega_inverse, "gamma": block.gamma_inverse}
            layers.append(
                _Layer(
                    block.path,
                    {"omega": block.omega.numpy(), "gamma": block.gamma.numpy()},
                    {name: v.numpy() for name, v in inverses.items() if block.inverted.numpy()},
                )
            )
    return layers


def _stack(factor: np.ndarray) -> np.ndarray:
    return factor[None] if factor.ndim == 2 else factor


def _draw(layer: _Layer, directory: pathlib.Path) -> pathlib.Path:
    # Without pyplot, which would keep figures and a window system.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.2), layout="constrained")
    *maps, spectrum = figure.subplots(1, 3)
    for axes, (name, symbol) in zip(maps, (("omega", "Ω"), ("gamma", "Γ")), strict=True):
        factor = layer.factors[name]
        image = axes.imshow(
            _block_diagonal(factor), cmap=_colours(), interpolation="nearest", **_limits(factor)
        )
        count, rows, _ = factor.shape
        blocks = f", {count} blocks of {rows}" if count > 1 else ""
        axes.set_title(f"{symbol}: {count * rows} rows{blocks}")
        figure.colorbar(image, ax=axes, shrink=0.85)
    for name, symbol, colour in (("omega", "Ω", "tab:blue"), ("gamma", "Γ", "tab:orange")):
        eigenvalues = _eigenvalues(layer.factors[name])
        unit = eigenvalues.mean() or 1.0
        position = np.linspace(0, 1, len(eigenvalues))
        marker = "." if len(eigenvalues) <= 40 else None
        shown = np.where(eigenvalues > _ROUNDING * eigenvalues[0], eigenvalues, np.nan)
        spectrum.plot(position, shown / unit, color=colour, marker=marker, label=symbol)
        if name in layer.inverses:
            damped = 1 / _eigenvalues(layer.inverses[name])[::-1]
            spectrum.plot(position, damped / unit, "--", color=colour, label=f"{symbol}, damped")
    spectrum.set_yscale("log")
    spectrum.set(title="eigenvalues", xlabel="rank, from 0 to 1", ylabel="over their mean")
    spectrum.grid(True, which="major", alpha=0.3)
    spectrum.legend()
    figure.suptitle(layer.path)
    file = directory / f"{layer.path.replace('/', '_')}.png"
    figure.savefig(file, dpi=110)
    return file


def _block_diagonal(factor: np.ndarray) -> np.ndarray:
    """`(blocks, n, n)` as one matrix with NaN outside of the blocks."""
    count, rows, _ = factor.shape
    matrix = np.full((count * rows, count * rows), np.nan, factor.dtype)
    for index, block in enumerate(factor):
        part = slice(index * rows, (index + 1) * rows)
        matrix[part, part] = block
    return matrix


def _colours() -> Any:
    from matplotlib import colormaps

    colours = colormaps["RdBu_r"].copy()
    colours.set_bad("0.85")
    return colours


def _limits(factor: np.ndarray) -> dict[str, float]:
    """Symmetric colour limits that a few outliers do not set."""
    limit = float(np.quantile(np.abs(factor), 0.995)) or float(np.abs(factor).max()) or 1.0
    return {"vmin": -limit, "vmax": limit}


def _eigenvalues(factor: np.ndarray) -> np.ndarray:
    """All eigenvalues of all blocks, the largest first."""
    return np.sort(np.linalg.eigvalsh(factor.astype("float64")).ravel())[::-1]
