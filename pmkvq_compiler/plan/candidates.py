"""The choices that a recipe allows for each layer, with their bytes and their sensitivities."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pmkvq_compiler.calibrate.calibration import Calibration
from pmkvq_compiler.formats import Format
from pmkvq_compiler.plan.charged import share_of
from pmkvq_compiler.plan.layer_plans import candidate_plans
from pmkvq_compiler.problem import Problem
from pmkvq_compiler.runtime.plan import LayerPlan, blocks_needed


@dataclass(frozen=True)
class Candidate:
    """One way to store a layer's cache.

    `size` are the bytes that it takes of the budget. `sensitivity` is the loss that the recipe minimizes. `key` and
    `value` are the formats of K and V, or None if nothing is quantized.
    """

    plan: LayerPlan
    size: int
    sensitivity: float
    key: Format | None = None
    value: Format | None = None


def candidates(problem: Problem, calibration: Calibration) -> list[list[Candidate]]:
    """The candidates of each layer, one for each plan that the recipe allows, with the formats of least loss."""
    by_gradient = problem.recipe.measure == "gradient"
    layers = []
    for site, plans in zip(problem.sites, candidate_plans(problem), strict=True):
        key_costs = (calibration.key_gradient if by_gradient else calibration.key_loss).get(site.layer, {})
        value_costs = (calibration.value_gradient if by_gradient else calibration.value_loss).get(site.layer, {})
        layers.append([_candidate(problem, plan, key_costs, value_costs) for plan in plans])
    return layers


def _candidate(
    problem: Problem, plan: LayerPlan, key_costs: Mapping[Format, float], value_costs: Mapping[Format, float]
) -> Candidate:
    """The candidate for a plan, with the best formats that have the plan's widths, axis and nearest window."""
    if not plan.quantized:
        return Candidate(plan, share_of(problem, plan), 0.0)
    key = min(
        (kept for kept in key_costs if (kept.bits, kept.axis) == (plan.key_bits, plan.key_axis)),
        key=lambda kept: (abs(kept.window - plan.window), key_costs[kept]),
    )
    value = min(
        (kept for kept in value_costs if kept.bits == plan.value_bits),
        key=lambda kept: (abs(kept.window - plan.window), value_costs[kept]),
    )
    cost = key_costs[key] + value_costs[value] if blocks_needed(plan, problem.max_len) else 0.0
    return Candidate(plan, share_of(problem, plan), cost, key, value)
