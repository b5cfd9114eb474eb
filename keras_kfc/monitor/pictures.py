"""Kronecker factors as pictures: heat maps and spectra, one PNG for each layer.

Needs matplotlib, which `pip install keras-kfc[pictures]` brings.
"""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np

from keras_kfc.analysis.factors import KroneckerFactors
from keras_kfc.passes.automatic import kronecker_optimizer
from keras_kfc.utils.texts import unused_name

# Eigenvalues below this share of the largest are rounding errors of float32.
_ROUNDING = 1e-8
_SYMBOLS = {"omega": "Ω", "gamma": "Γ"}
# A heat map of all blocks has no more rows than this.
_MOST_ROWS = 4096


@dataclasses.dataclass(frozen=True)
class _Layer:
    """What is drawn of one layer: the diagonal blocks of factors and of inverses, if known."""

    path: str
    factors: dict[str, list[np.ndarray]]
    inverses: dict[str, list[np.ndarray]]


def draw_factors(
    source: keras.Model | keras.optimizers.Optimizer | Mapping[str, KroneckerFactors],
    directory: str | pathlib.Path,
) -> list[pathlib.Path]:
    """Draws the factors of every layer as heat maps, and their eigenvalues.

    A picture shows omega and gamma, red above zero and blue below, entries outside of
    diagonal blocks in grey; and on the right the eigenvalues of each factor from the
    largest to the smallest, over their mean, with those of the damped factor dashed where
    an optimizer is drawn. Layers that have seen no data, or whose block has no matrices, are
    left out.

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
    >>> [file.name for file in keras_kfc.monitor.draw_factors(factors, tempfile.mkdtemp())]
    ['sequential_head.png']
    """
    require_matplotlib()
    layers = _layers_in(source)
    directory = pathlib.Path(directory)
    if layers:
        directory.mkdir(parents=True, exist_ok=True)
    names: list[str] = []
    for layer in layers:
        names.append(unused_name(layer.path.replace("/", "_"), names))
    return [
        _draw(layer, directory / f"{name}.png") for layer, name in zip(layers, names, strict=True)
    ]


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
            _Layer(path, {name: _blocks(getattr(f, name)) for name in ("omega", "gamma")}, {})
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
        layout = block.layout
        factors = {name: block.matrices(name) for name in layout.factor_shapes}
        factors = {name: parts for name, parts in factors.items() if parts}
        if block.ema_weight.numpy() > 0 and factors:
            inverses = {
                inverse.removesuffix("_inverse"): block.matrices(inverse)
                for inverse in layout.inverse_shapes
            }
            layers.append(
                _Layer(block.path, factors, inverses if block.has_inverses.numpy() else {})
            )
    return layers


def _blocks(factor: np.ndarray) -> list[np.ndarray]:
    return [factor] if factor.ndim == 2 else list(factor)


def _draw(layer: _Layer, file: pathlib.Path) -> pathlib.Path:
    # Without pyplot, which would keep figures and a window system.
    from matplotlib.figure import Figure

    count = len(layer.factors)
    figure = Figure(figsize=(4.4 * (count + 1), 4.2), layout="constrained")
    *maps, spectrum = figure.subplots(1, count + 1)
    for axes, (name, parts) in zip(maps, layer.factors.items(), strict=True):
        symbol = _SYMBOLS.get(name, name)
        shown = _that_fit(parts)
        matrix = _block_diagonal(shown)
        image = axes.imshow(matrix, cmap=_colours(), interpolation="nearest", **_limits(matrix))
        title = f"{symbol}: {sum(map(len, parts))} rows"
        if len(parts) > 1:
            title += f", {len(parts)} blocks"
        if len(shown) < len(parts):
            title += f", the first {len(shown)}"
        axes.set_title(title)
        figure.colorbar(image, ax=axes, shrink=0.85)
    for number, (name, parts) in enumerate(layer.factors.items()):
        symbol, colour = _SYMBOLS.get(name, name), f"C{number}"
        eigenvalues = _eigenvalues(parts)
        unit = eigenvalues.mean() or 1.0
        position = np.linspace(0, 1, len(eigenvalues))
        marker = "." if len(eigenvalues) <= 40 else None
        visible = np.where(eigenvalues > _ROUNDING * eigenvalues[0], eigenvalues, np.nan)
        spectrum.plot(position, visible / unit, color=colour, marker=marker, label=symbol)
        if name in layer.inverses:
            damped = 1 / _eigenvalues(layer.inverses[name])[::-1]
            spectrum.plot(position, damped / unit, "--", color=colour, label=f"{symbol}, damped")
    spectrum.set_yscale("log")
    spectrum.set(title="eigenvalues", xlabel="rank, from 0 to 1", ylabel="over their mean")
    spectrum.grid(True, which="major", alpha=0.3)
    spectrum.legend()
    figure.suptitle(layer.path)
    figure.savefig(file, dpi=110)
    return file


def _that_fit(parts: list[np.ndarray]) -> list[np.ndarray]:
    """The first blocks, at least one, that make a matrix of no more rows than can be shown."""
    ends = np.cumsum([len(part) for part in parts])
    return parts[: max(1, int(np.sum(ends <= _MOST_ROWS)))]


def _block_diagonal(parts: list[np.ndarray]) -> np.ndarray:
    """Blocks as one matrix with NaN outside of them."""
    rows = sum(map(len, parts))
    matrix = np.full((rows, rows), np.nan, parts[0].dtype)
    first = 0
    for part in parts:
        own = slice(first, first + len(part))
        matrix[own, own] = part
        first += len(part)
    return matrix


def _colours() -> Any:
    from matplotlib import colormaps

    return colormaps["RdBu_r"].with_extremes(bad="0.85")


def _limits(matrix: np.ndarray) -> dict[str, float]:
    """Symmetric colour limits that a few outliers do not set."""
    size = np.abs(matrix[np.isfinite(matrix)])
    limit = float(np.quantile(size, 0.995)) or float(size.max()) or 1.0
    return {"vmin": -limit, "vmax": limit}


def _eigenvalues(parts: list[np.ndarray]) -> np.ndarray:
    """All eigenvalues of all blocks, the largest first."""
    eigenvalues = [np.linalg.eigvalsh(part.astype("float64")) for part in parts]
    return np.sort(np.concatenate(eigenvalues))[::-1]
