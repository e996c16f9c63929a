"""Plans for several budgets, side by side: what would each cost the model?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from pmkvq_compiler.passes.program import AttentionSite

from .budget import parse_budget
from .calibrate import Calibration, Progress
from .calibration_file import load_or_calibrate
from .compile import Stages, captured
from .errors import CompileError
from .options import CompileOptions
from .planner import cache_bytes_at_16_bits, check_feasible, plan_table, solve
from .source import Source


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
    explored = []
    for number, (budget, size) in enumerate(sizes.items()):
        progress("plan", number, len(sizes))
        explored.append(_explored(budget, size, source, program.sites, calibration, options, max_len, original))
    progress("plan", len(sizes), len(sizes))
    return explored


def _explored(
    budget: str,
    size: int,
    source: Source,
    sites: Sequence[AttentionSite],
    calibration: Calibration,
    options: CompileOptions,
    max_len: int,
    original: int,
) -> Explored:
    try:
        solution = solve(sites, calibration, options, size, max_len, source.dtype)
    except CompileError:
        return Explored(budget)
    loss = sum(row.sensitivity for row in plan_table(solution, sites, calibration))
    taken = solution.plan.arena_bytes
    return Explored(budget, taken, 16 * taken / original, loss)


def log_shares(explored: Sequence[Explored]) -> list[float]:
    """The logarithm of each predicted loss from 0 (a tenth of the least) to 1 (the largest); 0 where there is none."""
    logs = {one: math.log(one.predicted_loss) for one in explored if one.predicted_loss}
    lowest, highest = min(logs.values(), default=0) - math.log(10), max(logs.values(), default=1)
    return [(logs[one] - lowest) / (highest - lowest) if one in logs else 0.0 for one in explored]
