"""Keras callbacks that only watch: curvature in the logs, factors as pictures."""

import pathlib
from typing import Any

import keras
import numpy as np

from keras_kfc.curvature.api import CurvatureBlock
from keras_kfc.monitor.pictures import draw_factors, require_matplotlib
from keras_kfc.optimizer.telemetry import watch_steps
from keras_kfc.passes.automatic import kronecker_optimizer
from keras_kfc.utils.arguments import check_choice, check_positive_integer
from keras_kfc.utils.texts import unused_name

SPECTRA = ("condition", "extremes", "none")


class CurvatureMonitor(keras.callbacks.Callback):
    """Puts the state of `keras_kfc.KFC` into the logs of every epoch.

    What is in the logs shows in the progress bar, in `History`, and in callbacks that
    come later in the list, such as `CSVLogger` and `TensorBoard`:

    * `learning_rate` and `damping` at the end of the epoch;
    * `step_scale`, `gradient_norm` and `update_norm`, means over the epoch's steps: the
      part, in [0, 1], of the longest step that is allowed which layers with a block took, and the
      norms over all variables of the gradients (after clipping) and of the changes (with
      momentum and weight decay);
    * with `KFC(step="quadratic")`, `reduction_ratio`: the change of the loss over the one that was
      foretold, averaged over the last steps that were judged;
    * `skipped_steps`, `rejected_factor_updates` and `rejected_inverse_updates`, counted from
      the beginning of training;
    * for each factor, by the path of its layer, `{path}/omega_condition` and
      `{path}/gamma_condition`: the condition number of the damped factor as it was last
      inverted, over all of its blocks. With `spectrum="extremes"` also `_max` and `_min`, the
      extreme eigenvalues of the factor without damping. NaN before there are any.

    The numbers of each step cost two norms in the train step, about 1 % of its time. A condition
    number costs one eigenvalue decomposition on the host for each factor and epoch, the extremes
    another: for n rows about `n³` products, a tenth of a second at n = 1,000.
    `python -m benchmarks.monitor` measures both.

    Args:
        spectrum: `"condition"`, `"extremes"`, or `"none"` for no numbers of single
            factors. Defaults to `"condition"`.

    Raises:
        ValueError: If `spectrum` is something else, or, when training begins, if the
            model is not compiled with `keras_kfc.KFC`.

    Example:

    >>> model = keras.Sequential([keras.Input((3,)), keras_kfc.layers.Dense(1, name="head")])
    >>> model.compile(keras_kfc.KFC(), "mse")
    >>> monitor = keras_kfc.monitor.CurvatureMonitor()
    >>> x = np.random.default_rng(0).normal(size=(32, 3))
    >>> history = model.fit(x, x[:, :1], verbose=0, callbacks=[monitor])
    >>> sorted(history.history)[:4]
    ['damping', 'gradient_norm', 'learning_rate', 'loss']
    """

    def __init__(self, spectrum: str = "condition"):
        super().__init__()
        self.spectrum = check_choice("spectrum", spectrum, SPECTRA)

    def on_train_begin(self, logs: Any = None) -> None:
        """Lets the optimizer note its steps."""
        if watch_steps(_optimizer_of(self.model, self)) and self.model.train_function is not None:
            # It was traced when nobody watched.
            self.model.make_train_function(force=True)

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Starts the means anew."""
        _optimizer_of(self.model, self).watched_steps.reset()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Adds to the logs."""
        if logs is not None:
            logs.update(self._values())

    def _values(self) -> dict[str, float]:
        optimizer = _optimizer_of(self.model, self)
        values = {
            "learning_rate": float(keras.ops.convert_to_numpy(optimizer.learning_rate)),
            "damping": float(keras.ops.convert_to_numpy(optimizer.damping)),
            **optimizer.watched_steps.means(),
        }
        if optimizer.step == "quadratic" and optimizer.parts is not None:
            values["reduction_ratio"] = float(
                optimizer.parts.measuring.damping_rule.reduction_ratio()
            )
        for name in ("skipped_steps", "rejected_factor_updates", "rejected_inverse_updates"):
            values[name] = int(getattr(optimizer, name).numpy())
        names: set[str] = set()
        for block in optimizer.blocks if self.spectrum != "none" else ():
            path = unused_name(block.path, names)
            names.add(path)
            for inverse in block.layout.inverse_shapes:
                name = inverse.removesuffix("_inverse")
                low, high = _extremes(block, inverse, block.has_inverses)
                values[f"{path}/{name}_condition"] = high / low
                if self.spectrum == "extremes":
                    low, high = _extremes(block, name, block.ema_weight)
                    values[f"{path}/{name}_min"], values[f"{path}/{name}_max"] = low, high
        return values


class FactorPictures(keras.callbacks.Callback):
    """Draws all Kronecker factors and their spectra at the end of epochs.

    Files are `{directory}/epoch_{number}/{layer}.png`, one for each layer; see
    `keras_kfc.monitor.draw_factors`. Needs matplotlib: `pip install keras-kfc[pictures]`.

    Args:
        directory: The folder to draw into, made if it is missing.
        every: Number of epochs from one drawing to the next.

    Raises:
        TypeError: If `every` is not an integer.
        ValueError: If `every` is below 1, or, when training begins, if the model is not
            compiled with `keras_kfc.KFC`.
        ImportError: If matplotlib is missing.
    """

    def __init__(self, directory: str | pathlib.Path, every: int = 1):
        super().__init__()
        require_matplotlib()
        self.directory = pathlib.Path(directory)
        self.every = check_positive_integer("every", every)

    def on_train_begin(self, logs: Any = None) -> None:
        """Makes sure that there will be factors to draw."""
        _optimizer_of(self.model, self)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Draws, if it is time."""
        if (epoch + 1) % self.every == 0:
            optimizer = _optimizer_of(self.model, self)
            draw_factors(optimizer, self.directory / f"epoch_{epoch + 1:03d}")


def _optimizer_of(model: keras.Model, callback: keras.callbacks.Callback) -> Any:
    optimizer = kronecker_optimizer(getattr(model, "optimizer", None))
    if optimizer is None:
        raise ValueError(
            f"{type(callback).__name__} needs a model that is compiled with `keras_kfc.KFC`. "
            f"Received: model.optimizer={getattr(model, 'optimizer', None)!r}"
        )
    return optimizer


def _extremes(block: CurvatureBlock, name: str, filled: keras.Variable) -> tuple[float, float]:
    """Smallest and largest eigenvalue of a factor or an inverse, NaN if it holds nothing."""
    if not filled.numpy():
        return float("nan"), float("nan")
    eigenvalues = np.concatenate(block.spectra(name))
    return float(eigenvalues.min()), float(eigenvalues.max())
