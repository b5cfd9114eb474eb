"""What the optimizer is made of once it knows the variables."""

import dataclasses
import weakref
from collections.abc import Set
from typing import Any

from keras_kfc.curvature.block_diagonal import BlockDiagonal
from keras_kfc.optimizer.batch_models import BatchModels, check_alone
from keras_kfc.optimizer.measuring import Measuring
from keras_kfc.optimizer.update import Update
from keras_kfc.placement.current import current_placement
from keras_kfc.steps.api import DampingRule
from keras_kfc.steps.choice import chosen_rule
from keras_kfc.steps.damping import GivenDamping
from keras_kfc.steps.levenberg_marquardt import LevenbergMarquardt
from keras_kfc.steps.quadratic_model import QuadraticSteps


@dataclasses.dataclass(frozen=True)
class Parts:
    """The parts that `KFC.build` makes.

    Args:
        curvature: The approximate Fisher matrix.
        momentums: For each trainable variable its momentum, or the average of its gradients
            where there is no block.
        second_moments: Likewise the average of their squares, None where there is a block.
        measuring: Takes in forward passes.
        update: Takes steps.
    """

    curvature: BlockDiagonal
    momentums: tuple[Any, ...]
    second_moments: tuple[Any, ...]
    measuring: Measuring
    update: Update


def parts_of(optimizer: Any, variables: list[Any], left_out: Set[int]) -> Parts:
    """Makes the parts with their variables, whose order is that of stored state.

    Args:
        optimizer: The `keras_kfc.KFC`.
        variables: The trainable variables.
        left_out: Indices of kernels that get no block.
    """
    curvature = BlockDiagonal(
        variables,
        optimizer.add_variable,
        optimizer.structure,
        optimizer.max_factor_dim,
        left_out,
        optimizer.weight_sharing,
    )
    for block in curvature.blocks:
        variables[block.kernel_index].kronecker_optimizer_ref = weakref.ref(optimizer)
    progress, polyak_steps = optimizer.progress, optimizer.polyak_steps
    polyak_steps.build(optimizer.add_variable, len(variables), bool(curvature.tables))
    momentums = tuple(optimizer.add_optimizer_variables(variables, "momentum"))
    second_moments = tuple(
        None
        if index in curvature.covered
        else optimizer.add_variable_from_reference(variable, name="second_moment")
        for index, variable in enumerate(variables)
    )
    polyak = None if optimizer.polyak_scaling is None else polyak_steps
    relative = optimizer.relative_damping
    damping: DampingRule = GivenDamping(lambda: optimizer.damping, relative)
    rule = chosen_rule(polyak, optimizer.norm_constraint, relative, progress)
    batch_models = None
    if optimizer.step == "quadratic":
        check_alone(current_placement().count)
        rule = quadratic = QuadraticSteps(polyak_steps)
        held = type(optimizer).damping.held_by(optimizer)
        damping = own = LevenbergMarquardt(held, optimizer.add_variable, relative)
        batch_models = BatchModels(optimizer, variables, curvature, own, momentums, quadratic)
    return Parts(
        curvature,
        momentums,
        second_moments,
        Measuring(optimizer, curvature, damping, progress, optimizer.notices, batch_models),
        Update(optimizer, curvature, rule, progress, momentums, second_moments, batch_models),
    )
