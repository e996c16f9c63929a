"""Plans for several budgets, side by side: what would each cost the model?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from pmkvq_compiler.calibrate.storage import load_or_calibrate
from pmkvq_compiler.compile import captured
from pmkvq_compiler.errors import CompileError
from pmkvq_compiler.options import CompileOptions
from pmkvq_compiler.plan.feasible import check_feasible
from pmkvq_compiler.plan.rerank import best_plans
from pmkvq_compiler.problem import Problem, resolve
from pmkvq_compiler.progress import Progress, Steps


@dataclass(frozen=True)
class Explored:
    """The plan for a budget in three figures, which are None if no plan fits. `predicted_loss` is in nats a token."""

    budget: str
    arena_bytes: int | None = None
    true_bits: float | None = None
    predicted_loss: float | None = None


def explore(options: CompileOptions, budgets: Sequence[str], progress: Progress) -> list[Explored]:
    """Plan for each of `budgets` from one calibration, without writing anything.

    Raises `UsageError` for a request that makes no sense, and `CompileError` if no plan fits any of the budgets.
    """
    steps = Steps(progress)
    source, program, max_len = captured(options, steps)
    problems = {
        budget: resolve(replace(options, budget=budget), program.sites, max_len, source.dtype, program.states)
        for budget in budgets
    }
    largest = max(problems.values(), key=lambda problem: problem.budget or 0)
    with steps("calibrate"):
        check_feasible(largest)
        calibration = load_or_calibrate(source, largest, options.output, progress, options.dry_run)
    feasible = [budget for budget, problem in problems.items() if _fits(problem)]
    with steps("plan"):
        plans = best_plans(source, [problems[budget] for budget in feasible], calibration, progress)
    explored = {budget: Explored(budget) for budget in problems}
    for budget, tried in zip(feasible, plans, strict=True):
        taken = tried.solution.plan.arena_bytes
        explored[budget] = Explored(budget, taken, 16 * taken / largest.original_bytes, tried.loss)
    return list(explored.values())


def _fits(problem: Problem) -> bool:
    try:
        check_feasible(problem)
    except CompileError:
        return False
    return True


def log_shares(explored: Sequence[Explored]) -> list[float]:
    """The logarithm of each predicted loss, scaled so that a tenth of the smallest loss is 0 and the largest loss is 1.
    A budget without a loss gets 0."""
    logs = {one: math.log(one.predicted_loss) for one in explored if one.predicted_loss}
    lowest, highest = min(logs.values(), default=0) - math.log(10), max(logs.values(), default=1)
    return [(logs[one] - lowest) / (highest - lowest) if one in logs else 0.0 for one in explored]
