"""Whether any plan can meet a request, before the model is run."""

from __future__ import annotations

import math
from collections.abc import Sequence

from pmkvq_compiler.errors import CompileError
from pmkvq_compiler.plan.layer_plans import candidate_plans
from pmkvq_compiler.problem import Problem
from pmkvq_compiler.runtime.plan import LayerPlan


def check_feasible(problem: Problem) -> None:
    """Raise the `CompileError` that `solve` would raise for want of bytes: nothing of it depends on a calibration."""
    smallest = smallest_bytes(candidate_plans(problem), problem.recipe.per_layer)
    if problem.budget is not None and problem.budget < smallest:
        mebibytes = math.ceil(smallest / 2**20 * 100) / 100
        raise CompileError(
            f"a budget of {problem.budget:,} bytes cannot hold {problem.batch_size} sequence(s) of "
            f"{problem.max_len:,} tokens; the smallest feasible one with recipe {problem.recipe_name!r} is "
            f"{smallest:,} bytes ({mebibytes}MiB)"
        )


def smallest_bytes(layers: Sequence[Sequence[LayerPlan]], per_layer: bool) -> int:
    """Bytes of the smallest plan; where layers may not differ, all take the same choice."""
    if per_layer:
        return sum(min(plan.arena_bytes for plan in layer) for layer in layers)
    return min(sum(plan.arena_bytes for plan in row) for row in zip(*layers, strict=True))
