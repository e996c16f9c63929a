"""Plans for several budgets, side by side: what would each cost the model?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from pmkvq_compiler.budget import parse_budget
from pmkvq_compiler.calibrate.storage import load_or_calibrate
from pmkvq_compiler.compile import captured
from pmkvq_compiler.errors import CompileError
from pmkvq_compiler.options import CompileOptions
from pmkvq_compiler.passes.program import AttentionSite
from pmkvq_compiler.plan.feasible import check_feasible
from pmkvq_compiler.plan.layer_plans import cache_bytes_at_16_bits
from pmkvq_compiler.plan.rerank import best_plans
from pmkvq_compiler.progress import Progress, Stages


@dataclass(frozen=True)
class Explored:
    """The plan for a budget in three figures; all None where no plan fits. `predicted_loss` is in nats a token."""

    budget: str
    arena_bytes: int | None = None
    true_bits: float | None = None
    predicted_loss: float | None = None


def explore(options: CompileOptions, budgets: Sequence[str], progress: Progress) -> list[Explored]:
    """Plan for each of `budgets`, from one calibration; nothing is written.

    Raises `UsageError` for a request that makes no sense, `CompileError` where none of the budgets holds a plan.
    """
    stages = Stages(progress)
    source, program, max_len = captured(options, stages)
    original = cache_bytes_at_16_bits(program.sites, max_len, options.batch_size)
    sizes = {budget: parse_budget(budget, original) for budget in budgets}
    largest = max(sizes, key=lambda budget: sizes[budget])
    with stages("calibrate"):
        options = replace(options, budget=largest)
        check_feasible(program.sites, options, sizes[largest], max_len, source.dtype)
        calibration = load_or_calibrate(source, program.sites, options, max_len, progress)
    feasible = [budget for budget in sizes if _fits(program.sites, options, sizes[budget], max_len, source.dtype)]
    with stages("plan"):
        chosen = [sizes[budget] for budget in feasible]
        plans = best_plans(source, program.sites, calibration, options, chosen, max_len, progress)
    explored = {budget: Explored(budget) for budget in sizes}
    for budget, tried in zip(feasible, plans, strict=True):
        taken = tried.solution.plan.arena_bytes
        explored[budget] = Explored(budget, taken, 16 * taken / original, tried.loss)
    return list(explored.values())


def _fits(
    sites: Sequence[AttentionSite], options: CompileOptions, budget: int, max_len: int, dtype: torch.dtype
) -> bool:
    try:
        check_feasible(sites, options, budget, max_len, dtype)
    except CompileError:
        return False
    return True


def log_shares(explored: Sequence[Explored]) -> list[float]:
    """The logarithm of each predicted loss from 0 (a tenth of the least) to 1 (the largest); 0 where there is none."""
    logs = {one: math.log(one.predicted_loss) for one in explored if one.predicted_loss}
    lowest, highest = min(logs.values(), default=0) - math.log(10), max(logs.values(), default=1)
    return [(logs[one] - lowest) / (highest - lowest) if one in logs else 0.0 for one in explored]
