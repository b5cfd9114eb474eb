"""The rule of the step size that an optimizer's arguments ask for."""

from keras_kfc.steps.api import StepRule
from keras_kfc.steps.loss_trend import Progress
from keras_kfc.steps.plain import PlainSteps
from keras_kfc.steps.polyak import PolyakSteps
from keras_kfc.steps.trust_region import TrustRegion


def chosen_rule(
    polyak: PolyakSteps | None, bound: float | None, relative: bool, progress: Progress
) -> StepRule:
    """Polyak's rule or plain steps, in a trust region if there is a bound.

    Args:
        polyak: Polyak's rule, or None for plain steps.
        bound: `ν` of the trust region, or None.
        relative: Whether it is a part of the loss.
        progress: The losses seen so far.
    """
    rule: StepRule = PlainSteps() if polyak is None else polyak
    return rule if bound is None else TrustRegion(rule, bound, relative, progress)
