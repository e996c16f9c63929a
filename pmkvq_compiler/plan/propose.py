"""Several plans for one budget, to be tried on the calibration texts.

Per-layer losses ignore what layers do to each other, and short texts make windows look better than they are. So the
integer program is solved with several weightings of the losses, and each solution is a proposal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from numpy import interp

from pmkvq_compiler.formats import by_code
from pmkvq_compiler.options import CompileOptions
from pmkvq_compiler.passes.program import AttentionSite
from pmkvq_compiler.plan.candidates import candidates
from pmkvq_compiler.plan.feasible import check_feasible, smallest_bytes
from pmkvq_compiler.plan.knapsack import choose, total_bytes, undominated
from pmkvq_compiler.plan.layer_plans import candidate_plans
from pmkvq_compiler.plan.solution import Solution
from pmkvq_compiler.recipes import RECIPES, resolved
from pmkvq_compiler.runtime.plan import (
    CachePlan,
)

if TYPE_CHECKING:
    from pmkvq_compiler.calibrate.calibration import Calibration
    from pmkvq_compiler.formats import Losses


WEIGHTS = ((1.0, 1.0), (1.0, 2.0), (1.0, 10.0), (4.0, 8.0))
"""What the sensitivities of keys by channel and by token are multiplied by, a proposal each: from plans that trust what
was measured, over plans that hardly group keys by token, to plans for which keys matter more than values. Errors of
keys in several layers may do together what none does alone, those of values hardly, and by token most of all."""


def propose(
    sites: Sequence[AttentionSite],
    calibration: Calibration,
    options: CompileOptions,
    budget: int | None,
    max_len: int,
    dtype: torch.dtype,
) -> list[Solution]:
    """Different plans for one budget, that of least sensitivity first. Arguments and errors are those of `solve`."""
    recipe = resolved(options)
    if recipe.measure == "gradient" or not recipe.per_layer:
        return [solve(sites, calibration, options, budget, max_len, dtype)]
    proposals = []
    for share in dict.fromkeys((1.0, min(1.0, options.calib_len / max_len))):
        keys = _with_windows(calibration.key_loss, share, recipe.block)
        values = _with_windows(calibration.value_loss, share, recipe.block)
        for weights in WEIGHTS:
            reweighed = replace(calibration, key_loss=_weighted(keys, *weights), value_loss=values)
            proposals.append(solve(sites, reweighed, options, budget, max_len, dtype))
    return list(dict.fromkeys(proposals))


def _weighted(losses: Losses, by_channel: float, by_token: float) -> Losses:
    """Losses of K so many times as large."""
    weights = {"channel": by_channel, "token": by_token}
    return {
        layer: {kept: loss * weights[kept.axis] for kept, loss in formats.items()} for layer, formats in losses.items()
    }


def _with_windows(losses: Losses, share: float, block: int) -> Losses:
    """Losses as they are where a window holds only a `share` of what it holds, but for its first `block` tokens.

    A window holds more of a short calibration text than of the long one that the cache is for. How much of what a
    model looks back to lies further back in a longer text is not to be seen in short ones, so plans are proposed from
    windows that help as they do in the texts and from windows that help as much less as they are a smaller part.
    Between the windows that were measured, losses are taken to be linear.
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


def solve(
    sites: Sequence[AttentionSite],
    calibration: Calibration,
    options: CompileOptions,
    budget: int | None,
    max_len: int,
    dtype: torch.dtype,
) -> Solution:
    """The plan of least sensitivity for `batch_size` sequences of `max_len` tokens within `budget` bytes.

    `dtype` is the model's own, in which sink and window are kept. `budget` may be None with recipe "none" alone.
    Raises `UsageError` for options that no plan can have, `CompileError` for a budget that no plan fits.
    """
    check_feasible(sites, options, budget, max_len, dtype)
    if budget is None:
        budget = smallest_bytes(candidate_plans(sites, options, max_len, dtype), options)
    layers = candidates(sites, calibration, options, max_len, dtype)
    if RECIPES[options.recipe].per_layer:
        chosen = tuple(choose([undominated(layer) for layer in layers], budget))
    else:
        chosen = max((row for row in zip(*layers, strict=True) if total_bytes(row) <= budget), key=total_bytes)
    plan = CachePlan(
        recipe=options.recipe,
        budget=budget,
        max_len=max_len,
        batch_size=options.batch_size,
        dtype=str(dtype).removeprefix("torch."),
        layers=tuple(candidate.plan for candidate in chosen),
    )
    return Solution(plan, tuple((candidate.key, candidate.value) for candidate in chosen))
