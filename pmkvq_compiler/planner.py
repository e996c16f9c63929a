"""The bit plan: one candidate a layer, least sensitivity in all, within the budget to the byte.

Choosing is a multiple-choice knapsack, solved as an integer program by CBC through PuLP: PM-KVQ's allocation,
with true bytes in place of code bits, over all that a recipe lets a layer choose: widths of K and V, grouping axis of
K, transforms and the window.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import pulp
import torch
from numpy import interp
from torch import Tensor

from pmkvq_compiler.passes.program import AttentionSite
from pmkvq_compiler.runtime.plan import (
    CODE_BITS,
    CachePlan,
    KeyAxis,
    LayerPlan,
    blocks_needed,
    fitted,
    original_bytes,
    sequence_bytes,
)
from pmkvq_compiler.runtime.quantize import WORD_BITS

from .budget import LARGEST_BYTES
from .errors import CompileError, UsageError
from .formats import Format, Transform, by_code
from .options import CompileOptions
from .recipes import RECIPES, Recipe, resolved

if TYPE_CHECKING:
    from .calibrate import Calibration, Matrices
    from .sensitivity import Losses

SOLVER_SECONDS, GAP = 20, 1e-7
OBJECTIVE_SCALE = 1e6

WEIGHTS = ((1.0, 1.0), (1.0, 2.0), (1.0, 10.0), (4.0, 8.0))
"""What the sensitivities of keys by channel and by token are multiplied by, a proposal each: from plans that trust what
was measured, over plans that hardly group keys by token, to plans for which keys matter more than values. Errors of
keys in several layers may do together what none does alone, those of values hardly, and by token most of all."""


@dataclass(frozen=True)
class Candidate:
    """One way to keep a layer's cache, its bytes for all sequences (`plan.arena_bytes`) and its sensitivity,
    which is what the recipe minimizes. `key` and `value` are the formats, None where nothing is quantized.
    """

    plan: LayerPlan
    sensitivity: float
    key: Format | None = None
    value: Format | None = None


@dataclass(frozen=True)
class Solution:
    """A plan, and the formats of K and V that it chose in each layer: they say what is to be folded."""

    plan: CachePlan
    formats: tuple[tuple[Format | None, Format | None], ...]

    @property
    def key_transforms(self) -> dict[int, Transform]:
        """What K is multiplied by, in the layers where it is."""
        return {n: key.transform for n, (key, _) in enumerate(self.formats) if key and key.transform != "none"}

    @property
    def value_transforms(self) -> dict[int, Transform]:
        """What V is multiplied by, in the layers where it is."""
        return {n: value.transform for n, (_, value) in enumerate(self.formats) if value and value.transform != "none"}


@dataclass(frozen=True)
class Folds:
    """What K and V are multiplied by before they are stored: matrices [Hkv, d, d] by layer."""

    keys: Mapping[int, Tensor]
    values: Mapping[int, Tensor]

    @classmethod
    def of(cls, solution: Solution, calibration: Calibration) -> Folds:
        """Those of a plan."""
        keys = {layer: key.transform for layer, (key, _) in enumerate(solution.formats) if key}
        values = {layer: value.transform for layer, (_, value) in enumerate(solution.formats) if value}
        return cls(_chosen(calibration.key_matrices, keys), _chosen(calibration.value_matrices, values))


def _chosen(matrices: Matrices, transforms: Mapping[int, Transform]) -> dict[int, Tensor]:
    """The matrices of each layer's transform; "none" has one where a power of two is needed."""
    return {
        layer: matrices[layer][transform]
        for layer, transform in transforms.items()
        if transform in matrices.get(layer, {}) or transform != "none"
    }


@dataclass(frozen=True)
class PlanRow:
    """A layer of the plan as the table and the report show it; `sensitivity` is its predicted loss
    alone, in nats a token."""

    layer: int
    key_bits: int
    value_bits: int
    key_axis: KeyAxis
    key_transform: Transform
    value_transform: Transform
    window: int
    arena_bytes: int
    sensitivity: float


def cache_bytes_at_16_bits(sites: Sequence[AttentionSite], max_len: int, batch_size: int) -> int:
    """Bytes of the whole cache at 16 bits a number: what budgets in percent and bits are shares of."""
    return sum(batch_size * original_bytes(_exact(site, max_len, block=0, itemsize=2), max_len) for site in sites)


def check_feasible(
    sites: Sequence[AttentionSite], options: CompileOptions, budget: int | None, max_len: int, dtype: torch.dtype
) -> None:
    """Raise what `solve` would raise for want of sensible options or bytes: nothing of it depends on a calibration."""
    _check_options(options, budget)
    original = cache_bytes_at_16_bits(sites, max_len, options.batch_size)
    if original > LARGEST_BYTES:
        raise UsageError(
            f"the cache of {options.batch_size:,} sequence(s) of {max_len:,} tokens has {original:,} bytes at 16 bits, "
            f"more than any machine holds; choose a smaller --batch-size or --max-len"
        )
    smallest = _smallest(_candidate_plans(sites, options, max_len, dtype), options)
    if budget is not None and budget < smallest:
        mebibytes = math.ceil(smallest / 2**20 * 100) / 100
        raise CompileError(
            f"a budget of {budget:,} bytes cannot hold {options.batch_size} sequence(s) of {max_len:,} tokens; the "
            f"smallest feasible one with recipe {options.recipe!r} is {smallest:,} bytes ({mebibytes}MiB)"
        )


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
        budget = _smallest(_candidate_plans(sites, options, max_len, dtype), options)
    layers = candidates(sites, calibration, options, max_len, dtype)
    if RECIPES[options.recipe].per_layer:
        chosen = tuple(choose([undominated(layer) for layer in layers], budget))
    else:
        chosen = max((row for row in zip(*layers, strict=True) if _total(row) <= budget), key=_total)
    plan = CachePlan(
        recipe=options.recipe,
        budget=budget,
        max_len=max_len,
        batch_size=options.batch_size,
        dtype=str(dtype).removeprefix("torch."),
        layers=tuple(candidate.plan for candidate in chosen),
    )
    return Solution(plan, tuple((candidate.key, candidate.value) for candidate in chosen))


def candidates(
    sites: Sequence[AttentionSite],
    calibration: Calibration,
    options: CompileOptions,
    max_len: int,
    dtype: torch.dtype,
) -> list[list[Candidate]]:
    """What the recipe allows for each layer: of formats that take the same bytes, those that cost least."""
    by_gradient = RECIPES[options.recipe].measure == "gradient"
    layers = []
    for site, plans in zip(sites, _candidate_plans(sites, options, max_len, dtype), strict=True):
        key_costs = (calibration.key_gradient if by_gradient else calibration.key_loss).get(site.layer, {})
        value_costs = (calibration.value_gradient if by_gradient else calibration.value_loss).get(site.layer, {})
        layers.append([_candidate(plan, key_costs, value_costs, max_len) for plan in plans])
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


def plan_table(solution: Solution, sites: Sequence[AttentionSite], calibration: Calibration) -> list[PlanRow]:
    """One row a layer."""
    return [
        PlanRow(
            layer=site.layer,
            key_bits=layer.key_bits,
            value_bits=layer.value_bits,
            key_axis=layer.key_axis,
            key_transform="none" if key is None else key.transform,
            value_transform="none" if value is None else value.transform,
            window=layer.window,
            arena_bytes=layer.arena_bytes,
            sensitivity=_loss(site.layer, layer, key, value, calibration, solution.plan.max_len),
        )
        for site, layer, (key, value) in zip(sites, solution.plan.layers, solution.formats, strict=True)
    ]


def _loss(
    layer: int, plan: LayerPlan, key: Format | None, value: Format | None, calibration: Calibration, max_len: int
) -> float:
    if key is None or value is None or not blocks_needed(plan, max_len):
        return 0.0
    return calibration.key_loss[layer][key] + calibration.value_loss[layer][value]


def choose(layers: Sequence[Sequence[Candidate]], budget: int) -> list[Candidate]:
    """One candidate of each layer, of least total sensitivity, with at most `budget` bytes in all.

    Bytes enter the program as exact small integers, divided by their common divisor, and the sum is checked afterwards:
    were a solution over the budget within the solver's tolerance, the next smaller budget would be solved.
    """
    unit = math.gcd(*(candidate.plan.arena_bytes for layer in layers for candidate in layer))
    capacity = budget // unit
    while _total(chosen := _solve_program(layers, unit, capacity)) > budget:
        capacity -= 1
    return chosen


def _solve_program(layers: Sequence[Sequence[Candidate]], unit: int, capacity: int) -> list[Candidate]:
    """`choose` by CBC: x = 1 takes a candidate, each layer takes one, and they have `capacity` units of bytes."""
    largest = max(candidate.sensitivity for layer in layers for candidate in layer) or 1.0
    program = pulp.LpProblem("plan", pulp.LpMinimize)
    taken = {
        (i, j): pulp.LpVariable(f"x_{i}_{j}", cat=pulp.LpBinary)
        for i, layer in enumerate(layers)
        for j in range(len(layer))
    }
    program += pulp.lpSum(layers[i][j].sensitivity / largest * OBJECTIVE_SCALE * x for (i, j), x in taken.items())
    program += pulp.lpSum(layers[i][j].plan.arena_bytes // unit * x for (i, j), x in taken.items()) <= capacity
    for i, layer in enumerate(layers):
        program += pulp.lpSum(taken[i, j] for j in range(len(layer))) == 1

    solver = pulp.PULP_CBC_CMD(msg=False, gapRel=GAP, timeLimit=SOLVER_SECONDS)
    if not solver.available():
        raise CompileError(
            "the CBC solver of PuLP is missing; install it again with `pip install --force-reinstall pulp`"
        )
    try:
        program.solve(solver)
    except pulp.PulpSolverError as error:
        raise CompileError(
            f"the CBC solver of PuLP did not run ({error}); see whether the machine has memory and room for temporary "
            f"files, or install it again with `pip install --force-reinstall pulp`"
        ) from error
    if program.sol_status not in (pulp.LpSolutionOptimal, pulp.LpSolutionIntegerFeasible):
        raise CompileError(f"the CBC solver ended with {pulp.LpSolution[program.sol_status]!r}; try another budget")
    return [next(c for j, c in enumerate(layer) if taken[i, j].value() > 0.5) for i, layer in enumerate(layers)]


def undominated(layer: Sequence[Candidate]) -> list[Candidate]:
    """The candidates that no other beats in both bytes and sensitivity, smallest first."""
    kept: list[Candidate] = []
    for candidate in sorted(layer, key=lambda c: (c.plan.arena_bytes, c.sensitivity)):
        if not kept or candidate.sensitivity < kept[-1].sensitivity:
            kept.append(candidate)
    return kept


def _check_options(options: CompileOptions, budget: int | None) -> None:
    recipe = resolved(options)
    if budget is None and options.recipe != "none":
        raise UsageError(f"recipe {options.recipe!r} needs a budget; give --budget, 25% for example")
    if recipe.block < WORD_BITS or recipe.block % WORD_BITS:
        raise UsageError(f"a block of {recipe.block} tokens is not a multiple of {WORD_BITS}; choose 64")
    if recipe.sink < 0 or not recipe.windows:
        raise UsageError(
            f"sink {recipe.sink} and window {options.window} are not possible: a window holds at least one block of "
            f"{recipe.block} tokens, a sink none or more"
        )
    wrong = [bits for bits in options.bits if bits not in CODE_BITS]
    if wrong or not options.bits:
        raise UsageError(f"bits {wrong or 'none'} cannot be stored; choose among {', '.join(map(str, CODE_BITS))}")


def _total(chosen: Iterable[Candidate]) -> int:
    return sum(candidate.plan.arena_bytes for candidate in chosen)


def _choices(sites: Sequence[AttentionSite], options: CompileOptions) -> list[tuple[int, int, KeyAxis, int]]:
    """(K bits, V bits, K axis, window) that the recipe allows; K is packed along channels, which must fill whole
    words."""
    if options.recipe == "none":
        return []
    recipe = resolved(options)
    channels = math.gcd(*(site.key_head_dim for site in sites))
    widths = [bits for bits in sorted(options.bits, reverse=True) if channels * bits % WORD_BITS == 0]
    if not widths:
        raise CompileError(
            f"{channels} channels of a key do not fill {WORD_BITS}-bit words at {options.bits} bits; allow wider --bits"
        )
    return [
        (key, value, axis, window)
        for key in widths
        for value in ([key] if recipe.same_bits else widths)
        for axis in recipe.key_axes
        for window in recipe.windows
    ]


def _candidate_plans(
    sites: Sequence[AttentionSite], options: CompileOptions, max_len: int, dtype: torch.dtype
) -> list[list[LayerPlan]]:
    """The plans of `candidates`, but for what depends on a calibration."""
    recipe, choices = resolved(options), _choices(sites, options)
    layers = []
    for site in sites:
        plans = [_quantized(site, recipe, max_len, *choice) for choice in choices]
        if recipe.exact_layers:
            plans.insert(0, _exact(site, max_len, recipe.block, dtype.itemsize))
        layers.append(
            [
                replace(plan, arena_bytes=options.batch_size * sequence_bytes(plan, max_len, dtype.itemsize))
                for plan in plans
            ]
        )
    return layers


def _smallest(layers: Sequence[Sequence[LayerPlan]], options: CompileOptions) -> int:
    """Bytes of the smallest plan; some recipes take the same choice in every layer."""
    if RECIPES[options.recipe].per_layer:
        return sum(min(plan.arena_bytes for plan in layer) for layer in layers)
    return min(sum(plan.arena_bytes for plan in row) for row in zip(*layers, strict=True))


def _exact(site: AttentionSite, max_len: int, block: int, itemsize: int) -> LayerPlan:
    """A cache that is never quantized: its window holds every token that a query can see.

    A full window drops a whole block, so a sliding-window layer needs one block more than it sees.
    """
    window = max_len if site.sliding_window is None else min(max_len, site.sliding_window + block)
    bits = 8 * itemsize
    return LayerPlan(
        num_key_value_heads=site.num_key_value_heads,
        key_head_dim=site.key_head_dim,
        value_head_dim=site.value_head_dim,
        key_bits=bits,
        value_bits=bits,
        key_axis="token",
        sink=0,
        window=window,
        block=block,
        sliding_window=site.sliding_window,
        stages=(),
        arena_bytes=0,
    )


def _quantized(
    site: AttentionSite, recipe: Recipe, max_len: int, key_bits: int, value_bits: int, key_axis: KeyAxis, window: int
) -> LayerPlan:
    stages = lowering_stages(key_bits, value_bits, together=recipe.same_bits)
    plan = LayerPlan(
        num_key_value_heads=site.num_key_value_heads,
        key_head_dim=site.key_head_dim,
        value_head_dim=site.value_head_dim,
        key_bits=key_bits,
        value_bits=value_bits,
        key_axis=key_axis,
        sink=min(recipe.sink, max_len - 1) if site.sliding_window is None else 0,
        window=window,
        block=recipe.block,
        sliding_window=site.sliding_window,
        stages=stages if recipe.progressive else stages[-1:],
        arena_bytes=0,
    )
    return fitted(plan, max_len)


def lowering_stages(key_bits: int, value_bits: int, together: bool) -> tuple[tuple[int, int], ...]:
    """(K, V) widths from 16 bits down to the final ones, halved `together` or one at a time.

    One at a time, the wider goes first, V before K where they are equal: K needs its bits more.
    """
    key, value = CODE_BITS[0], CODE_BITS[0]
    stages = [(key, value)]
    while (key, value) != (key_bits, value_bits):
        lower_value = value > value_bits and (value >= key or key == key_bits)
        if together or not lower_value:
            key //= 2
        if together or lower_value:
            value //= 2
        stages.append((key, value))
    return tuple(stages)
