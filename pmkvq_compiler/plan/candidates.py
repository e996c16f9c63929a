"""What a recipe allows for each layer, with its bytes and its sensitivity."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pmkvq_compiler.calibrate.calibration import Calibration
from pmkvq_compiler.formats import Format
from pmkvq_compiler.plan.layer_plans import candidate_plans
from pmkvq_compiler.problem import Problem
from pmkvq_compiler.runtime.plan import LayerPlan, blocks_needed


@dataclass(frozen=True)
class Candidate:
    """One way to keep a layer's cache, its bytes for all sequences (`plan.arena_bytes`) and its sensitivity,
    which is what the recipe minimizes. `key` and `value` are the formats, None where nothing is quantized.
    """

    plan: LayerPlan
    sensitivity: float
    key: Format | None = None
    value: Format | None = None


def candidates(problem: Problem, calibration: Calibration) -> list[list[Candidate]]:
    """What the recipe allows for each layer: of formats that take the same bytes, those that cost least."""
    by_gradient = problem.recipe.measure == "gradient"
    layers = []
    for site, plans in zip(problem.sites, candidate_plans(problem), strict=True):
        key_costs = (calibration.key_gradient if by_gradient else calibration.key_loss).get(site.layer, {})
        value_costs = (calibration.value_gradient if by_gradient else calibration.value_loss).get(site.layer, {})
        layers.append([_candidate(plan, key_costs, value_costs, problem.max_len) for plan in plans])
    return layers


def _candidate(
    plan: LayerPlan, key_costs: Mapping[Format, float], value_costs: Mapping[Format, float], max_len: int
) -> Candidate:
    """The plan with the best formats of its widths, axis and window."""
    if not plan.quantized:
        return Candidate(plan, 0.0)
    key = min(
        (kept for kept in key_costs if (kept.bits, kept.axis) == (plan.key_bits, plan.key_axis)),
        key=lambda kept: (abs(kept.window - plan.window), key_costs[kept]),
    )
    value = min(
        (kept for kept in value_costs if kept.bits == plan.value_bits),
        key=lambda kept: (abs(kept.window - plan.window), value_costs[kept]),
    )
    cost = key_costs[key] + value_costs[value] if blocks_needed(plan, max_len) else 0.0
    return Candidate(plan, cost, key, value)
