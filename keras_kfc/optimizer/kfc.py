"""KFC, which holds the arguments and the parts (`keras_kfc.optimizer.parts`)."""

import random
from collections.abc import Iterable, Sequence
from typing import Any

import keras

from keras_kfc._compat.keras_internals import compile_loss
from keras_kfc._compat.whole_step import WholeStepOptimizer
from keras_kfc.optimizer import arguments, resuming
from keras_kfc.optimizer.alike import check_workers
from keras_kfc.optimizer.hyperparameter import Hyperparameter
from keras_kfc.optimizer.memory import MemoryUsage, usage_of
from keras_kfc.optimizer.notices import Notices
from keras_kfc.optimizer.parts import Parts, parts_of
from keras_kfc.optimizer.receiving import receive_pass
from keras_kfc.passes.automatic import AutomaticCaptures, take_capture
from keras_kfc.passes.capture import Capture
from keras_kfc.placement.current import current_placement
from keras_kfc.steps.loss_trend import Progress
from keras_kfc.steps.polyak import PolyakSteps
from keras_kfc.utils.arguments import check_base_arguments


@keras.saving.register_keras_serializable(package="keras_kfc")
class KFC(WholeStepOptimizer):
    """Kronecker Factors for Convolution, an approximate natural gradient.

    Momentum gradient descent, preconditioned for every layer of a class in `keras_kfc.layers` by
    a Kronecker-factored approximation of the Fisher matrix: KFC-pre of [Grosse & Martens,
    2016](https://arxiv.org/abs/1602.01407), damped as in [Martens & Grosse,
    2015](https://arxiv.org/abs/1503.05671). With `D` the gradient of a layer's kernel and bias
    as one matrix, a step is

        Ω ← average of E[Σ_t ā_t ā_tᵀ]               every `curvature_update_period` steps
        Γ ← average of E[(1/|T|) Σ_t Ds_t Ds_tᵀ]     likewise
        d = (Ω + π √λ I)⁻¹ D (Γ + √λ/π I)⁻¹          inverses anew every
                                                     `inverse_update_period` steps
        α = c s (1 - μ) / average of (Σ d·D / G)     one for all layers
        β = min(α, η (1 - μ) / rms(d))               a bound for each layer
        v = -β d
        p ← μ ρ p + v
        θ ← θ - w n β / (1 - μ) θ + μ ρ p + v        (p in place of μ ρ p + v without Nesterov)

    `α` is Polyak's step size in the metric of the Fisher matrix: a gradient, momentum included,
    promises to take off a part `c`, `polyak_scaling`, of the gap `G`, what the loss has above the
    lowest value within reach. `η` is the learning rate: no layer's weights move by more in a
    step, root mean square and, but for `ρ`, with momentum. `s` is `η` over its highest value so
    far, so that a schedule acts on all steps. `ρ` is what the average makes steps shorter by,
    mostly at first, so that momentum is as short as they are. Kernels decay by a part `w` of the
    step, so far as the gradient is noise, `n`. `λ` is `damping` times the mean eigenvalue of the
    layer's own block. Updates are due more often at first. See `docs/method.md` for the reasons.

    The Fisher matrix is the generalised Gauss-Newton matrix of the compiled loss, with all weights;
    where a loss has none, the empirical Fisher matrix, and KFC logs so. Adam trains variables of
    other layers. Steps, factors and inverses that are not finite are skipped and counted.

    Args:
        learning_rate: A float, a `LearningRateSchedule`, or a callable without arguments: `η`, the
            most that a layer's weights move in a step, root mean square. Defaults to `0.03`.
        damping: A float, at least 0, or a `LearningRateSchedule`. Tikhonov damping `λ`, in units of
            mean eigenvalues of the block, or absolute (`relative_damping`). Defaults to `0.15`.
        momentum: Float in [0, 1), the paper's `μ`. Defaults to `0.9`.
        nesterov: Whether it is Nesterov's momentum. Defaults to `True`.
        polyak_scaling: A float, at least 0, or a `LearningRateSchedule`: the part `c` of the loss
            above its lowest value that a gradient may promise to take off. It and `damping` can be
            set during training. None for steps `learning_rate * d`, unbounded. Defaults to
            `"auto"`: 3 if `learning_rate` is a `LearningRateSchedule`, else 1.
        norm_constraint: Bound of a trust region on the Fisher norm of a step, as a part of `L - L₀`
            (absolute if `relative_damping=False`), or None. Defaults to `None`.
        fisher: Which derivatives make `Γ`: `"sampled"` draws targets from the model's prediction
            (as the paper does), `"curvature_propagation"` draws signs, `"empirical"` takes the
            training targets, `"exact"` has a pass for each output. Defaults to `"sampled"`.
        curvature_ema: Decay of the averages of the factors for one update, in [0, 1); small batches
            are forgotten more slowly, unless it is 0. Defaults to `0.95`.
        curvature_update_period: Steps between factor updates, the paper's `T_s`. Defaults to `10`.
        inverse_update_period: Steps between inverse updates, the paper's `T_f`. Defaults to `20`.
        relative_damping: Whether `damping` and `norm_constraint` are relative, as above, or
            absolute, as in the paper. Defaults to `True`.
        factor_batch_size: Number of examples of a batch to estimate factors from, neighbours that
            are drawn anew for each update, or None for all. Defaults to `None`.
        structure: What layers' Fisher blocks are kept as: `"kronecker"` (the default), the paper's
            product of two factors, `"eigenbasis"` (EKFAC), `"diagonal"`, or `"full"`.
        weight_sharing: How factors take inputs, derivatives, positions: independent (`"expand"`),
            with positions alike (`"reduce"`), as they are (`"trace"`); None by layer, the default.
        max_factor_dim: Rows of a factor beyond which it is cut into diagonal blocks of that size
            or less (a convolution's kernel positions stay together), which is logged; None for no
            limit. One of n rows takes `8 n²` bytes with its inverse, and about `n³` products each
            time it is inverted. Defaults to `512`.
        sharding: What replicas share out: `"none"`, the work of `"inverses"` (the default), or that
            and `"preconditioning"`, with one exchange more a step.
        step: How far a step goes: `"polyak"`, as above, or `"quadratic"`, for large batches on one
            device: `α` and `μ` minimise a quadratic model with the exact Fisher matrix, `damping`
            adapts itself, and steps that make their batch's loss worse are not taken. Defaults to
            `"polyak"`.
        adam_lr_ratio: That of the fallback rule over `learning_rate`. Defaults to `0.2`.
        seed: Integer in [0, 2**31) for the drawn targets, or None for a random one.
        name: Name of the optimizer. Defaults to `"kfc"`.
        weight_decay: Float, at least 0, or None: decoupled weight decay `w` of all variables of two
            axes or more that are not excluded. Kernels of covered layers decay in proportion to
            the step, as above, all others by a fifth of `w * adam_lr_ratio * learning_rate`, of
            embeddings only the rows that a batch used. Defaults to `0.02`.
        clipnorm: Float or None. Norm that the gradient of each weight is clipped to.
        clipvalue: Float or None. What gradients are clipped to.
        global_clipnorm: Float or None. Joint norm that all gradients are clipped to.
        use_ema: Whether to keep a moving average of the weights, which replaces them when `fit`
            ends (to evaluate on it, see `docs/tuning.md`). Defaults to `False`.
        ema_momentum: Float, decay of that average. Defaults to `0.99`.
        ema_overwrite_frequency: Integer or None. Steps after which it overwrites the weights.
        loss_scale_factor: Float or None. Factor that the loss was multiplied by.
        gradient_accumulation_steps: Integer or None. Batches whose gradients are averaged for a
            step.

    Attributes:
        blocks: The Fisher blocks, one for each matrix of a covered layer, with their `path`.
        skipped_steps: Variable that counts steps with derivatives that were not finite.
        rejected_factor_updates: Counts layers' factors of a batch left out as not finite.
        rejected_inverse_updates: Counts inverses that were not finite, and so not used.

    Example:

    >>> model = keras.Sequential([keras.Input((8, 8, 1)), keras.layers.Conv2D(4, 3)])
    >>> model.add(keras.layers.Flatten())
    >>> model.add(keras.layers.Dense(2, activation="softmax"))
    >>> model = keras_kfc.instrument(model)
    >>> model.compile(optimizer=keras_kfc.KFC(), loss="sparse_categorical_crossentropy")
    >>> images = np.random.default_rng(0).normal(size=(32, 8, 8, 1))
    >>> labels = (images.mean(axis=(1, 2, 3)) > 0).astype("int32")
    >>> history = model.fit(images, labels, epochs=3, verbose=0)
    >>> [block.path.split("/")[-1] for block in model.optimizer.blocks]
    ['conv2d', 'dense']
    """

    damping = Hyperparameter()
    polyak_scaling = Hyperparameter(optional=True)

    def __init__(
        self,
        learning_rate: Any = 0.03,
        damping: Any = 0.15,
        momentum: float = 0.9,
        nesterov: bool = True,
        polyak_scaling: Any = "auto",
        norm_constraint: float | None = None,
        fisher: str = "sampled",
        curvature_ema: float = 0.95,
        curvature_update_period: int = 10,
        inverse_update_period: int = 20,
        relative_damping: bool = True,
        factor_batch_size: int | None = None,
        structure: str = "kronecker",
        weight_sharing: str | None = None,
        max_factor_dim: int | None = 512,
        sharding: str = "inverses",
        step: str = "polyak",
        adam_lr_ratio: float = 0.2,
        seed: int | None = None,
        weight_decay: float | None = 0.02,
        clipnorm: float | None = None,
        clipvalue: float | None = None,
        global_clipnorm: float | None = None,
        use_ema: bool = False,
        ema_momentum: float = 0.99,
        ema_overwrite_frequency: int | None = None,
        loss_scale_factor: float | None = None,
        gradient_accumulation_steps: int | None = None,
        name: str | None = None,
        **kwargs: Any,
    ):
        given = {k: v for k, v in locals().items() if k not in ("self", "kwargs", "__class__")}
        base = {argument: given[argument] for argument in arguments.KERAS_ARGUMENTS}
        check_base_arguments(base)
        super().__init__(name=name, **base, **kwargs)
        for argument, value in arguments.checked(given).items():
            setattr(self, argument, value)
        arguments.check_step(given)
        self.damping = damping
        self.polyak_scaling = arguments.chosen_scaling(polyak_scaling, learning_rate)
        draw = random.randrange(2**31) if self.seed is None else self.seed
        self.draw_seed = self._counter("seed", draw)
        for counter in ("skipped_steps", "rejected_factor_updates", "rejected_inverse_updates"):
            setattr(self, counter, self._counter(counter))
        self.progress = Progress(self.add_variable)
        self.polyak_steps = PolyakSteps(self.add_variable, self.progress)
        self.notices = Notices()
        self.automatic_captures = AutomaticCaptures()
        self.waiting, self.watched_steps = resuming.Waiting(), None
        self.parts: Parts | Any = None  # what `build` makes

    def _counter(self, name: str, initial: int = 0) -> keras.Variable:
        initializer = keras.initializers.Constant(initial)
        return self.add_variable((), initializer=initializer, dtype="int64", name=name)

    @property
    def blocks(self) -> list[Any]:
        """The blocks, one for each covered layer; empty before `build`."""
        return [] if self.parts is None else list(self.parts.curvature.blocks)

    def build(self, variables: list[Any]) -> None:
        """Creates factors, inverses and momenta for a list of trainable variables."""
        if self.built:
            return
        check_workers(self, variables)
        self.waiting.before_build = frozenset(map(id, self.variables))
        super().build(variables)
        self.parts = parts_of(self, variables, self.waiting.all_left_out())
        resuming.take_waiting(self)

    def update_factors(
        self, capture: Capture, loss: Any = None, y_true: Any = None, y_pred: Any = None,
        sample_weight: Any = None,
    ) -> None:  # fmt: skip
        """Updates the factors from one forward pass, if that is due.

        `fit` does this itself; custom loops call it between the forward pass and `apply_gradients`.

        Args:
            capture: The `keras_kfc.Capture` that was open during the forward pass.
            loss: The loss, as `keras.Model.compile` takes it.
            y_true: Targets.
            y_pred: The model's outputs in the forward pass.
            sample_weight: Sample weights or None.

        Raises:
            ValueError: If the optimizer is not built.
        """
        arguments.check_forward_pass(self.built, capture, loss=loss, y_pred=y_pred)
        # What the model captured by itself belongs to another forward pass.
        take_capture(self)
        compiled = compile_loss(loss)
        value = compiled(y_true, y_pred, sample_weight)
        self.parts.measuring.take_in(capture, compiled, y_true, y_pred, sample_weight, value)

    def apply(self, grads: Iterable[Any], trainable_variables: Iterable[Any] | None = None) -> None:
        """Updates the variables, after taking in a pending forward pass.

        Args:
            grads: Gradients.
            trainable_variables: The variables they belong to; optional once built.
        """
        grads = list(grads)
        if trainable_variables is not None:
            trainable_variables = list(trainable_variables)
        receive_pass(self, grads, trainable_variables)
        super().apply(grads, trainable_variables)

    def take_step(
        self, gradients: Sequence[Any], variables: Sequence[Any], learning_rate: Any
    ) -> None:
        """Takes a step with all gradients at once; Keras calls this."""
        current_placement().run_once(self.parts.measuring.refresh)
        by_index = {self.index_of(variable): variable for variable in variables}
        self.parts.update.take(by_index, gradients, self.clipped, learning_rate)

    def has_block(self, kernel: keras.Variable) -> bool:
        """Whether a kernel variable has a block, or may get one in `build`."""
        return not self.built or self.parts.curvature.has_block(kernel)

    def adopt(self, variables: Sequence[Any]) -> bool:
        """Builds anew if layers were instrumented since; False if training would be lost."""
        return resuming.adopt(self, variables)

    def memory_usage(self, variables: Sequence[Any] | None = None) -> MemoryUsage:
        """Tells what factors, inverses and momenta take, layer by layer.

        Args:
            variables: The trainable variables of the model, while the optimizer is
                not built; nothing is made or built for them.

        Returns:
            A `MemoryUsage`, which prints as a table.

        Raises:
            ValueError: If the optimizer is not built and no variables are given.
            TypeError: If `variables` is not a list of variables.
        """
        return usage_of(self, variables)

    def save_own_variables(self, store: Any) -> None:
        """Stores all variables, and how they are laid out."""
        resuming.save(self, store)

    def load_own_variables(self, store: Any) -> None:
        """Takes over stored variables, all or none."""
        resuming.load(self, store)

    def get_config(self) -> dict[str, Any]:
        """Configuration from which `from_config` makes an equal optimizer."""
        settable = {s.name: s.serialized(self) for s in (KFC.damping, KFC.polyak_scaling)}
        own = {name: getattr(self, name) for name in arguments.CHECKS}
        return super().get_config() | settable | own

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> "KFC":
        """Makes an optimizer from its configuration."""
        config = arguments.under_present_names(config)
        for settable in (cls.damping, cls.polyak_scaling):
            config = settable.deserialized(config, custom_objects)
        return super().from_config(config, custom_objects=custom_objects)
