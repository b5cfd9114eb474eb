"""Keras callbacks that only watch: curvature in the logs, factors as pictures."""

import pathlib
from typing import Any

import keras
import numpy as np

from keras_kfc.curvature.api import CurvatureBlock
from keras_kfc.monitor.checks import RunChecks
from keras_kfc.monitor.pictures import draw_factors, require_matplotlib
from keras_kfc.optimizer.notices import share_with_block
from keras_kfc.optimizer.telemetry import watch_steps
from keras_kfc.passes.automatic import kronecker_optimizer
from keras_kfc.utils.arguments import check_choice, check_positive_integer
from keras_kfc.utils.texts import unused_name

SPECTRA = ("auto", "condition", "extremes", "none")
# So many blocks still make a progress bar that can be read.
_FEW_BLOCKS = 4


class CurvatureMonitor(keras.callbacks.Callback):
    """Puts the state of `keras_kfc.KFC` into the logs, and warns of what looks wrong.

    What is in the logs shows in the progress bar, in `History`, and in callbacks that
    come later in the list, such as `CSVLogger` and `TensorBoard`:

    * `learning_rate` and `damping` at the end of the epoch;
    * `coverage`, the part of the parameters that have a block of the curvature, in [0, 1];
    * `factor_age` and `inverse_age`: steps since all factors moved, and since the oldest inverses
      were renewed; NaN before the monitor has seen that;
    * `step_scale`, `gradient_norm` and `update_norm`, means over the epoch's steps: the
      part, in [0, 1], of the longest step that is allowed which layers with a block took, and the
      norms over all variables of the gradients (after clipping) and of the changes (with
      momentum and weight decay);
    * with `KFC(step="quadratic")`, `reduction_ratio`: the change of the loss over the one that was
      foretold, averaged over the last steps that were judged, and `steps_taken_back`, the part of
      the epoch's steps that made the loss worse;
    * `skipped_steps`, `rejected_factor_updates` and `rejected_inverse_updates`, counted from
      the beginning of training;
    * for each factor, by the path of its layer, `{path}/omega_condition` and
      `{path}/gamma_condition`: the condition number of the damped factor as it was last
      inverted, over all of its blocks. With `spectrum="extremes"` also `_max` and `_min`, the
      extreme eigenvalues of the factor without damping. NaN before there are any.

    A warning is logged, once, where many steps were skipped or taken back, where factors or
    inverses are much older than their periods, where every step is as long as a small
    `learning_rate` allows, and where a schedule never acts in this training, or ends early.

    The numbers of each step cost two norms in the train step, about 1 % of its time. A condition
    number costs one eigenvalue decomposition on the host for each factor and epoch, the extremes
    another: for n rows about `n³` products, a tenth of a second at n = 1,000.
    `python -m benchmarks.monitor` measures both.

    Args:
        spectrum: `"condition"`, `"extremes"`, `"none"` for no numbers of single factors, or
            `"auto"`: condition numbers where there are four blocks or fewer, else none, so that
            the logs of deep nets stay short. Defaults to `"auto"`.

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
    ['coverage', 'damping', 'factor_age', 'gradient_norm']
    """

    def __init__(self, spectrum: str = "auto"):
        super().__init__()
        self.spectrum = check_choice("spectrum", spectrum, SPECTRA)

    def on_train_begin(self, logs: Any = None) -> None:
        """Lets the optimizer note its steps."""
        optimizer = _optimizer_of(self.model, self)
        if watch_steps(optimizer) and self.model.train_function is not None:
            # It was traced when nobody watched.
            self.model.make_train_function(force=True)
        self._checks, self._begun = RunChecks(optimizer), False

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Starts the means anew, and looks at schedules in the first epoch."""
        optimizer = _optimizer_of(self.model, self)
        epochs, steps = (self.params.get(name) for name in ("epochs", "steps"))
        if epochs and steps and not self._begun:
            accumulated = optimizer.gradient_accumulation_steps or 1
            # Where training goes on, the first is not epoch 0.
            self._checks.check_schedules((epochs - epoch) * steps // accumulated)
        self._begun = True
        optimizer.watched_steps.reset()
        self._first_step = int(optimizer.iterations.numpy())

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Adds to the logs, and warns of what looks wrong."""
        values = self._values()
        optimizer = _optimizer_of(self.model, self)
        self._checks.check_epoch(int(optimizer.iterations.numpy()) - self._first_step, values)
        if logs is not None:
            logs.update(values)

    def _values(self) -> dict[str, float]:
        optimizer = _optimizer_of(self.model, self)
        watched, parts = optimizer.watched_steps, optimizer.parts
        values = {
            "learning_rate": float(keras.ops.convert_to_numpy(optimizer.learning_rate)),
            "damping": float(keras.ops.convert_to_numpy(optimizer.damping)),
            "coverage": float("nan"),
            **watched.means(),
            **watched.ages(int(optimizer.iterations.numpy())),
        }
        taken_back = values.pop("taken_back")
        if parts is not None:
            # There is a momentum of each variable's shape.
            values["coverage"] = share_with_block(parts.curvature, parts.momentums)
            if optimizer.step == "quadratic":
                values["reduction_ratio"] = float(parts.measuring.damping_rule.reduction_ratio())
                values["steps_taken_back"] = taken_back
        for name in ("skipped_steps", "rejected_factor_updates", "rejected_inverse_updates"):
            values[name] = int(getattr(optimizer, name).numpy())
        names: set[str] = set()
        few = len(optimizer.blocks) <= _FEW_BLOCKS
        shown = self.spectrum != "none" and (few or self.spectrum != "auto")
        for block in optimizer.blocks if shown else ():
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
