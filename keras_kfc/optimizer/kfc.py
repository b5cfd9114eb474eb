"""KFC: momentum gradient descent preconditioned by Kronecker factors.

This module holds the arguments, state and configuration of the optimizer; how it
takes in statistics stands in `factor_updates`, what it does with gradients in
`update`.
"""

import random
import weakref
from typing import Any

import keras

from keras_kfc.curvature.block_diagonal import Preconditioner
from keras_kfc.optimizer.arguments import CHECKS, KERAS_ARGUMENTS, checked
from keras_kfc.optimizer.factor_updates import FactorUpdates
from keras_kfc.optimizer.memory import usage_of
from keras_kfc.passes.automatic import PendingCaptures
from keras_kfc.steps.loss_trend import Progress
from keras_kfc.steps.polyak import PolyakSteps
from keras_kfc.utils.arguments import check_base_arguments


@keras.saving.register_keras_serializable(package="keras_kfc")
class KFC(FactorUpdates):
    """Kronecker Factors for Convolution, an approximate natural gradient.

    Momentum gradient descent, preconditioned for every layer of a class in
    `keras_kfc.layers` by a Kronecker-factored approximation of the
    Fisher matrix. With `D` the gradient of a layer's kernel and bias as one
    matrix, a step is

        Ω ← average of E[Σ_t ā_t ā_tᵀ]               every `factor_update_period` steps
        Γ ← average of E[(1/|T|) Σ_t Ds_t Ds_tᵀ]     likewise
        d = (Ω + π √λ I)⁻¹ D (Γ + √λ/π I)⁻¹          inverses anew every
                                                     `inverse_update_period` steps
        α = c s (1 - μ) / average of (Σ d·D / G)     one for all layers
        β = min(α, η (1 - μ) / rms(d))               a bound for each layer
        v = -β d
        p ← μ p + v
        θ ← θ - w n β / (1 - μ) θ + μ p + v          (p in place of μ p + v without Nesterov)

    Updates that have a period are due more often at the start: in each of the first 8
    steps, in every second of the next 8, in every fourth of the next 16, and so on, up to
    the period.

    `α` is Polyak's step size in the metric of the Fisher matrix: a gradient, momentum included,
    promises to take off a part `c`, `polyak`, of the gap `G`, which is what the loss has above the
    lowest value within reach. The targets tell of that value, and how fast the loss falls. `η` is
    the learning rate: no layer's weights move by more in a step, root mean square and with
    momentum, as with Adam. `s` is `η` over its highest value so far, so that a schedule acts on
    steps below the bound, too. Where the train step hides its loss, a layer moves by a fifth of
    the bound. The reasons, and the constants, stand in `docs/method.md`.

    Kernels decay by a part `w`, `weight_decay`, of the step, so far as the gradient is noise:
    `n = 1 - min(1, 2 (L - L₀) / Σ d·D)`, since a quadratic loss without noise has
    `Σ d·D = 2 (L - L₀)`. Where `L₀` is not known, they decay as all other variables do.

    All this is free of scale: `λ` is `damping` times the mean eigenvalue of the layer's own
    block by default, and a loss weight changes nothing.

    The Fisher matrix is the generalised Gauss-Newton matrix of the compiled loss, with sample,
    class and loss weights, for Keras's losses and for functions of your own that are twice
    differentiable in a model's outputs. Where there is none, as for a loss over pairs of examples,
    KFC takes the empirical Fisher matrix, and logs so once.

    Variables of other layers are trained by Adam with a learning rate of
    `fallback_lr_ratio * learning_rate`, and an epsilon relative to the size of
    the gradients. A step whose derivatives hold a NaN or an infinity is skipped
    and counted; so are factors and inverses that are not finite.

    Args:
        learning_rate: A float, a
            `keras.optimizers.schedules.LearningRateSchedule` instance, or a
            callable that takes no arguments and returns the value to use: `η`, the most that a
            layer's weights move in a step, root mean square. Defaults to `0.03`.
        damping: A float, at least 0, or a `LearningRateSchedule`. Tikhonov
            damping `λ`, in units of the mean eigenvalue of the layer's block
            (absolute if `scale_free=False`). Can be read and set during
            training. Defaults to `0.2`.
        momentum: Float in [0, 1), the paper's `μ`. Defaults to `0.9`.
        nesterov: Whether to use Nesterov momentum. Defaults to `True`.
        polyak: A float, at least 0, or a `LearningRateSchedule`: the part `c` of the loss above
            its lowest value that a gradient may promise to take off. Can be read and set
            during training. None for steps of `learning_rate * d`, without a bound.
            Defaults to `1.0`.
        kl_clip: Bound of a trust region, `ν ≤ kl_clip (L - L₀)` (absolute, `ν ≤ kl_clip`, if
            `scale_free=False`), or None for none where Polyak's rule applies.
            Defaults to `None`.
        fisher: Which derivatives make `Γ`: `"sampled"` draws targets from the
            model's own prediction (as the paper does), `"empirical"` takes the
            training targets, `"exact"` sums over all classes or outputs, one
            backward pass for each. Defaults to `"sampled"`.
        factor_decay: Decay of the moving averages of the factors for one
            update, in [0, 1); batches count by their examples, and small ones are
            forgotten more slowly, unless it is 0. Defaults to `0.95`.
        factor_update_period: Steps between updates of the factors, the paper's
            `T_s`. Defaults to `10`.
        inverse_update_period: Steps between updates of the inverses, the
            paper's `T_f`. Defaults to `20`.
        scale_free: Whether `damping` and `kl_clip` are relative, as above. With
            False they are absolute, as in the paper. Defaults to `True`.
        factor_samples: Number of examples of a batch to estimate factors from, drawn
            anew for each update (neighbours, so batches should be shuffled), or None
            for all. Products for the factors get cheaper, the backward pass for them
            does not, and estimates get noisier. Defaults to `None`.
        max_factor_dim: Rows of a factor beyond which it is cut into diagonal blocks
            of that size or less (but a convolution's kernel positions stay together),
            with a logged warning that tells what the whole would take; None for no
            limit. A factor of n rows takes `8 n²` bytes with its inverse, about `n³`
            products each time it is inverted, and n products for each of the layer's
            weights in every step. Defaults to `2048`.
        fallback_lr_ratio: Learning rate of the fallback rule over
            `learning_rate`. Defaults to `0.2`.
        seed: Integer in [0, 2**31) for the drawn targets, or None for a random one.
        name: Name of the optimizer. Defaults to `"kfc"`, with a number where that is taken.
        weight_decay: Float, at least 0, or None: decoupled weight decay `w` of all variables
            of two axes or more (so not of biases and scales) that are not excluded. Kernels of
            covered layers decay in proportion to the step, as above, all others by a fifth of
            `w * fallback_lr_ratio * learning_rate`, of embeddings only the rows that a batch
            used. Defaults to `0.02`.
        clipnorm: Float. If set, the gradient of each weight is clipped to this norm.
        clipvalue: Float. If set, gradients are clipped to be no higher than this value.
        global_clipnorm: Float. If set, all gradients are clipped to this joint norm.
        use_ema: Whether to keep a moving average of the weights, which replaces them when
            `fit` ends, as the paper evaluates. Defaults to `False`.
        ema_momentum: Float, decay of that average, which forgets within
            `1 / (1 - ema_momentum)` steps. The paper's lasts about an epoch:
            `1 - 1 / steps_per_epoch`. Defaults to `0.99`.
        ema_overwrite_frequency: Integer or None. If set, the weights are overwritten
            by their average every so many steps.
        loss_scale_factor: Float or None. Factor that the loss was multiplied by, to
            be divided out of the gradients.
        gradient_accumulation_steps: Integer or None. If set, weights are updated
            every so many batches, and the batches' gradients are averaged.

    Attributes:
        blocks: The Kronecker blocks, one for each covered layer, with their
            `path`, `omega`, `gamma`, `omega_inverse` and `gamma_inverse`.
        skipped_steps: Variable that counts steps with derivatives that were not finite.
        skipped_factor_updates: Counts layers' factors of a batch left out as not finite.
        skipped_inverse_updates: Counts inverses that were not finite, and so not used.

    Example:

    >>> model = keras.Sequential(
    ...     [
    ...         keras.Input((8, 8, 1)),
    ...         keras_kfc.layers.Conv2D(4, 3, activation="relu"),
    ...         keras.layers.Flatten(),
    ...         keras_kfc.layers.Dense(2, activation="softmax"),
    ...     ]
    ... )
    >>> model.compile(optimizer=keras_kfc.KFC(), loss="sparse_categorical_crossentropy")
    >>> images = np.random.default_rng(0).normal(size=(32, 8, 8, 1))
    >>> labels = (images.mean(axis=(1, 2, 3)) > 0).astype("int32")
    >>> history = model.fit(images, labels, epochs=3, verbose=0)
    >>> [block.path.split("/")[-1] for block in model.optimizer.blocks]
    ['conv2d', 'dense']
    >>> int(model.optimizer.skipped_steps)
    0

    References:

    - [Grosse & Martens, 2016](https://arxiv.org/abs/1602.01407), KFC-pre
    - [Martens & Grosse, 2015](https://arxiv.org/abs/1503.05671), factored damping
    """

    def __init__(
        self,
        learning_rate=0.03,
        damping=0.2,
        momentum=0.9,
        nesterov=True,
        polyak=1.0,
        kl_clip=None,
        fisher="sampled",
        factor_decay=0.95,
        factor_update_period=10,
        inverse_update_period=20,
        scale_free=True,
        factor_samples=None,
        max_factor_dim=2048,
        fallback_lr_ratio=0.2,
        seed=None,
        weight_decay=0.02,
        clipnorm=None,
        clipvalue=None,
        global_clipnorm=None,
        use_ema=False,
        ema_momentum=0.99,
        ema_overwrite_frequency=None,
        loss_scale_factor=None,
        gradient_accumulation_steps=None,
        name=None,
        **kwargs,
    ):
        arguments = locals()
        base = {argument: arguments[argument] for argument in KERAS_ARGUMENTS}
        check_base_arguments(base)
        super().__init__(name=name, **base, **kwargs)
        for argument, value in checked(arguments).items():
            setattr(self, argument, value)
        self.damping = damping
        self.polyak = polyak
        draw = random.randrange(2**31) if self.seed is None else self.seed
        self._draw_seed = self._counter("seed", initial=draw)
        self.skipped_steps = self._counter("skipped_steps")
        self.skipped_factor_updates = self._counter("skipped_factor_updates")
        self.skipped_inverse_updates = self._counter("skipped_inverse_updates")
        self.progress = Progress(self.add_variable)
        self.step_size = PolyakSteps(self.add_variable, self.progress)
        self._preconditioner: Any = None
        self._momentums: tuple[Any, ...] = ()
        self._second_moments: tuple[Any, ...] = ()
        self._noticed = False
        self._told = False
        self.pending_captures = PendingCaptures()
        self._left_out = self._told_of = self._before_build = frozenset()
        self._stored = None
        self.watched_steps = None

    def _counter(self, name: str, initial: int = 0) -> keras.Variable:
        initializer = keras.initializers.Constant(initial)
        return self.add_variable((), initializer=initializer, dtype="int64", name=name)

    @property
    def blocks(self):
        """The Kronecker blocks, one for each covered layer; empty before `build`."""
        return [] if self._preconditioner is None else list(self._preconditioner.blocks)

    def build(self, variables):
        """Creates factors, inverses and momenta.

        Args:
            variables: The trainable variables.
        """
        if self.built:
            return
        self._before_build = frozenset(map(id, self._variables))
        super().build(variables)
        self._left_out |= self._stored_left_out()
        self._preconditioner = Preconditioner(
            variables, self.add_variable, self.max_factor_dim, self._left_out
        )
        for block in self.blocks:
            variables[block.kernel].kronecker_owner = weakref.ref(self)
        self.step_size.build(self.add_variable, len(variables))
        covered = self._preconditioner.covered
        self._momentums = tuple(self.add_optimizer_variables(variables, "momentum"))
        self._second_moments = tuple(
            None
            if index in covered
            else self.add_variable_from_reference(variable, name="second_moment")
            for index, variable in enumerate(variables)
        )
        self._take_waiting_state()

    def has_block(self, kernel):
        """Whether a kernel variable has a Kronecker block, or may get one in `build`."""
        return not self.built or self._preconditioner.has_block(kernel)

    def memory_usage(self, variables=None):
        """Tells what factors, inverses and momenta take, layer by layer.

        Args:
            variables: The trainable variables of the model, while the optimizer is
                not built; nothing is made or built for them.

        Returns:
            A `MemoryUsage`, which prints as a table, with its `entries` and `total` in bytes.

        Raises:
            ValueError: If the optimizer is not built and no variables are given.
            TypeError: If `variables` is not a list of variables.

        Example:

        >>> model = keras.Sequential([keras.Input((3,)), keras_kfc.layers.Dense(2)])
        >>> usage = keras_kfc.KFC().memory_usage(model.trainable_variables)
        >>> usage.entries[0].omega, usage.entries[0].inverses
        ((1, 4, 4), 80)
        """
        return usage_of(self, variables)

    def get_config(self):
        """Configuration from which `from_config` makes an equal optimizer."""
        return {
            **super().get_config(),
            "damping": KFC.damping.serialized(self),
            "polyak": KFC.polyak.serialized(self),
            **{name: getattr(self, name) for name in CHECKS},
        }

    @classmethod
    def from_config(cls, config, custom_objects=None):
        """Makes an optimizer from its configuration."""
        for settable in (cls.damping, cls.polyak):
            config = settable.deserialized(config, custom_objects)
        return super().from_config(config, custom_objects=custom_objects)
