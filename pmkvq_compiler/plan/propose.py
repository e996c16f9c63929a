"""Several plans for one budget, to be tried on the calibration texts.

Per-layer losses ignore what layers do to each other, and short texts make windows look better than they are. So the
integer program is solved with several weightings of the losses, and each solution is a proposal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from numpy import interp

from pmkvq_compiler.calibrate.calibration import Calibration
from pmkvq_compiler.formats import Losses, by_code
from pmkvq_compiler.passes.program import attention_layers
from pmkvq_compiler.plan.candidates import Candidate, candidates
from pmkvq_compiler.plan.charged import charged_bytes
from pmkvq_compiler.plan.feasible import check_feasible, smallest_bytes
from pmkvq_compiler.plan.knapsack import choose, total_bytes, undominated
from pmkvq_compiler.plan.solution import Solution
from pmkvq_compiler.problem import Problem
from pmkvq_compiler.runtime.plan import CachePlan

WEIGHTS = ((1.0, 1.0), (1.0, 2.0), (1.0, 10.0), (4.0, 8.0))
"""Factors for the losses of keys grouped by channel and by token; each pair gives a proposal. The first pair trusts the
measurements, the next ones avoid keys grouped by token more and more, and the last one favours keys over values. Errors
of keys in several layers can do damage together that none of them does alone, most of all with groups by token. Errors
of values hardly do."""


def propose(problem: Problem, calibration: Calibration) -> list[Solution]:
    """Different plans for one budget, the one of least sensitivity first. Raises the same errors as `solve`."""
    recipe = problem.recipe
    if recipe.measure == "gradient" or not recipe.per_layer:
        return [solve(problem, calibration)]
    proposals = []
    for share in dict.fromkeys((1.0, min(1.0, problem.calib_len / problem.max_len))):
        keys = _with_windows(calibration.key_loss, share, recipe.block)
        values = _with_windows(calibration.value_loss, share, recipe.block)
        for weights in WEIGHTS:
            reweighed = replace(calibration, key_loss=_weighted(keys, *weights), value_loss=values)
            proposals.append(solve(problem, reweighed))
    return list(dict.fromkeys(proposals))


def _weighted(losses: Losses, by_channel: float, by_token: float) -> Losses:
    """Losses of K, multiplied by a factor for each way to group it."""
    weights = {"channel": by_channel, "token": by_token}
    return {
        layer: {kept: loss * weights[kept.axis] for kept, loss in formats.items()} for layer, formats in losses.items()
    }


def _with_windows(losses: Losses, share: float, block: int) -> Losses:
    """The losses that windows would have if, beyond its first `block` tokens, each held only a `share` of its tokens.

    A window covers more of a short calibration text than of the long texts that the cache is for. Short texts cannot
    show how much further back a model looks in long ones. So we propose plans for both cases: windows help as much as
    in the calibration texts, or they help less, by as much as the window is a smaller part of a long text. Losses
    between the windows that were measured are interpolated linearly.
    """
    found: Losses = {}
    for layer, formats in losses.items():
        found[layer] = {}
        for _, alike in by_code(formats):
            alike.sort(key=lambda kept: kept.window)
            windows = [kept.window for kept in alike]
            shorter = [block + (window - block) * share for window in windows]
            there = interp(shorter, windows, [formats[kept] for kept in alike]).tolist()
            found[layer].update(zip(alike, there, strict=True))
    return found


def solve(problem: Problem, calibration: Calibration) -> Solution:
    """The plan of least sensitivity for `batch_size` sequences of `max_len` tokens within the budget.

    Raises `CompileError` if no plan fits the budget.
    """
    check_feasible(problem)
    per_layer, budget = problem.recipe.per_layer, problem.budget
    if budget is None:
        budget = smallest_bytes(problem)
    layers = candidates(problem, calibration)

    def taken(chosen: Sequence[Candidate]) -> int:
        return charged_bytes(problem, [candidate.plan for candidate in chosen])

    if per_layer:
        chosen = tuple(choose([undominated(layer) for layer in layers], budget, taken))
    else:
        chosen = max((row for row in zip(*layers, strict=True) if taken(row) <= budget), key=total_bytes)
    plan = CachePlan(
        recipe=problem.recipe_name,
        budget=budget,
        max_len=problem.max_len,
        batch_size=problem.batch_size,
        dtype=str(problem.dtype).removeprefix("torch."),
        layers=tuple(candidate.plan for candidate in chosen),
        attention_layers=attention_layers(problem.sites),
        states=problem.states,
    )
    return Solution(plan, tuple((candidate.key, candidate.value) for candidate in chosen))
