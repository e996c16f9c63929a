"""Finds out whether any plan can meet a request, before the model is run."""

from __future__ import annotations

import math
from functools import partial

from pmkvq_compiler.errors import CompileError
from pmkvq_compiler.plan.charged import charged_bytes, share_of
from pmkvq_compiler.plan.layer_plans import candidate_plans
from pmkvq_compiler.problem import Problem


def check_feasible(problem: Problem) -> None:
    """Raises `CompileError` if even the smallest plan is over the budget. This needs no calibration."""
    smallest = smallest_bytes(problem)
    if problem.budget is not None and problem.budget < smallest:
        mebibytes = math.ceil(smallest / 2**20 * 100) / 100
        raise CompileError(
            f"a budget of {problem.budget:,} bytes cannot hold {problem.batch_size} sequence(s) of "
            f"{problem.max_len:,} tokens; the smallest feasible budget with recipe {problem.recipe_name!r} is "
            f"{smallest:,} bytes, so give --budget {mebibytes}MiB or more"
        )


def smallest_bytes(problem: Problem) -> int:
    """The bytes of the smallest plan. Unless layers may differ (`per_layer`), all of them take the same choice."""
    layers = candidate_plans(problem)
    if problem.recipe.per_layer:
        return charged_bytes(problem, [min(layer, key=partial(share_of, problem)) for layer in layers])
    return min(charged_bytes(problem, row) for row in zip(*layers, strict=True))
