"""The bit plan: one candidate a layer, least sensitivity in all, within the budget to the byte.

Choosing is a multiple-choice knapsack, solved as an integer program by CBC through PuLP: PM-KVQ's allocation,
with true bytes in place of code bits, K and V apart, and the grouping axis of K as a third choice.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import pulp
import torch

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

from .errors import CompileError, UsageError
from .options import CompileOptions

if TYPE_CHECKING:
    from .calibrate import Calibration

SINK, PM_KVQ_SINK, WINDOW = 4, 1, 128
SOLVER_SECONDS, GAP = 20, 1e-7
OBJECTIVE_SCALE = 1e6


@dataclass(frozen=True)
class Candidate:
    """One way to keep a layer's cache, its bytes for all sequences (`plan.arena_bytes`) and its sensitivity."""

    plan: LayerPlan
    sensitivity: float


@dataclass(frozen=True)
class PlanRow:
    """A layer of the plan as the table and the report show it; `sensitivity` in nats of calibration loss."""

    layer: int
    key_bits: int
    value_bits: int
    key_axis: KeyAxis
    arena_bytes: int
    sensitivity: float


def sink_and_window(options: CompileOptions) -> tuple[int, int]:
    """Tokens kept exact at the start and at the end of a sequence: the user's, or the recipe's."""
    sink = PM_KVQ_SINK if options.recipe == "pm-kvq" else SINK
    return sink if options.sink is None else options.sink, WINDOW if options.window is None else options.window


def cache_bytes_at_16_bits(sites: Sequence[AttentionSite], max_len: int, batch_size: int) -> int:
    """Bytes of the whole cache at 16 bits a number: what budgets in percent and bits are shares of."""
    return sum(batch_size * original_bytes(_exact(site, max_len, block=0, itemsize=2), max_len) for site in sites)


def check_feasible(
    sites: Sequence[AttentionSite], options: CompileOptions, budget: int | None, max_len: int, dtype: torch.dtype
) -> None:
    """Raise what `solve` would raise for want of sensible options or bytes: nothing of it depends on a calibration."""
    _check_options(options, budget)
    smallest = _smallest(_candidate_plans(sites, options, max_len, dtype), options)
    if budget is not None and budget < smallest:
        mebibytes = math.ceil(smallest / 2**20 * 100) / 100
        raise CompileError(
            f"a budget of {budget:,} bytes cannot hold {options.batch_size} sequence(s) of {max_len:,} tokens; the "
            f"smallest feasible one with recipe {options.recipe!r} is {smallest:,} bytes ({mebibytes}MiB)"
        )


def solve(
    sites: Sequence[AttentionSite],
    calibration: Calibration,
    options: CompileOptions,
    budget: int | None,
    max_len: int,
    dtype: torch.dtype,
) -> CachePlan:
    """The plan of least sensitivity for `batch_size` sequences of `max_len` tokens within `budget` bytes.

    `dtype` is the model's own, in which sink and window are kept. `budget` may be None with recipe "none" alone.
    Raises `UsageError` for options that no plan can have, `CompileError` for a budget that no plan fits.
    """
    check_feasible(sites, options, budget, max_len, dtype)
    if budget is None:
        budget = _smallest(_candidate_plans(sites, options, max_len, dtype), options)
    layers = candidates(sites, calibration, options, max_len, dtype)
    if options.recipe == "uniform":
        chosen = max((row for row in zip(*layers, strict=True) if _total(row) <= budget), key=_total)
    else:
        chosen = tuple(choose([undominated(layer) for layer in layers], budget))
    return CachePlan(
        recipe=options.recipe,
        budget=budget,
        max_len=max_len,
        batch_size=options.batch_size,
        dtype=str(dtype).removeprefix("torch."),
        layers=tuple(candidate.plan for candidate in chosen),
    )


def candidates(
    sites: Sequence[AttentionSite],
    calibration: Calibration,
    options: CompileOptions,
    max_len: int,
    dtype: torch.dtype,
) -> list[list[Candidate]]:
    """What the recipe allows for each layer, widest first."""
    return [
        [Candidate(plan, _sensitivity(plan, site.layer, calibration, max_len)) for plan in plans]
        for site, plans in zip(sites, _candidate_plans(sites, options, max_len, dtype), strict=True)
    ]


def plan_table(plan: CachePlan, sites: Sequence[AttentionSite], calibration: Calibration) -> list[PlanRow]:
    """One row a layer."""
    return [
        PlanRow(
            layer=site.layer,
            key_bits=layer.key_bits,
            value_bits=layer.value_bits,
            key_axis=layer.key_axis,
            arena_bytes=layer.arena_bytes,
            sensitivity=_sensitivity(layer, site.layer, calibration, plan.max_len),
        )
        for site, layer in zip(sites, plan.layers, strict=True)
    ]


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
    program.solve(solver)
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
    sink, window = sink_and_window(options)
    if budget is None and options.recipe != "none":
        raise UsageError(f"recipe {options.recipe!r} needs a budget; give --budget, 25% for example")
    if options.block < WORD_BITS or options.block % WORD_BITS:
        raise UsageError(f"a block of {options.block} tokens is not a multiple of {WORD_BITS}; choose 64")
    if sink < 0 or window < options.block:
        raise UsageError(
            f"sink {sink} and window {window} are not possible: a window holds at least one block of {options.block} "
            f"tokens, a sink none or more"
        )
    wrong = [bits for bits in options.bits if bits not in CODE_BITS]
    if wrong or not options.bits:
        raise UsageError(f"bits {wrong or 'none'} cannot be stored; choose among {', '.join(map(str, CODE_BITS))}")


def _total(chosen: Iterable[Candidate]) -> int:
    return sum(candidate.plan.arena_bytes for candidate in chosen)


def _choices(sites: Sequence[AttentionSite], options: CompileOptions) -> list[tuple[int, int, KeyAxis]]:
    """(K bits, V bits, K axis) that the recipe allows; K is packed along channels, which must fill whole words."""
    if options.recipe == "none":
        return []
    channels = math.gcd(*(site.key_head_dim for site in sites))
    widths = [bits for bits in sorted(options.bits, reverse=True) if channels * bits % WORD_BITS == 0]
    if not widths:
        raise CompileError(
            f"{channels} channels of a key do not fill {WORD_BITS}-bit words at {options.bits} bits; allow wider --bits"
        )
    if options.recipe == "best":
        axes: tuple[KeyAxis, ...] = ("token", "channel")
        return [(key, value, axis) for key in widths for value in widths for axis in axes]
    return [(bits, bits, "token") for bits in widths]


def _candidate_plans(
    sites: Sequence[AttentionSite], options: CompileOptions, max_len: int, dtype: torch.dtype
) -> list[list[LayerPlan]]:
    """The plans of `candidates`."""
    choices = _choices(sites, options)
    layers = []
    for site in sites:
        plans = [_quantized(site, options, max_len, *choice) for choice in choices]
        if options.recipe in ("best", "none"):
            plans.insert(0, _exact(site, max_len, options.block, dtype.itemsize))
        layers.append(
            [
                replace(plan, arena_bytes=options.batch_size * sequence_bytes(plan, max_len, dtype.itemsize))
                for plan in plans
            ]
        )
    return layers


def _smallest(layers: Sequence[Sequence[LayerPlan]], options: CompileOptions) -> int:
    """Bytes of the smallest plan; "uniform" takes the same choice in every layer."""
    if options.recipe == "uniform":
        return min(sum(plan.arena_bytes for plan in row) for row in zip(*layers, strict=True))
    return sum(min(plan.arena_bytes for plan in layer) for layer in layers)


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
    site: AttentionSite, options: CompileOptions, max_len: int, key_bits: int, value_bits: int, key_axis: KeyAxis
) -> LayerPlan:
    sink, window = sink_and_window(options)
    stages = lowering_stages(key_bits, value_bits, together=options.recipe == "pm-kvq")
    plan = LayerPlan(
        num_key_value_heads=site.num_key_value_heads,
        key_head_dim=site.key_head_dim,
        value_head_dim=site.value_head_dim,
        key_bits=key_bits,
        value_bits=value_bits,
        key_axis=key_axis,
        sink=min(sink, max_len - 1) if site.sliding_window is None else 0,
        window=window,
        block=options.block,
        sliding_window=site.sliding_window,
        stages=stages[-1:] if options.recipe == "uniform" else stages,
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


def _sensitivity(plan: LayerPlan, layer: int, calibration: Calibration, max_len: int) -> float:
    """Of a layer kept as `plan`: 0 where nothing of it is ever quantized."""
    if not blocks_needed(plan, max_len):
        return 0.0
    return (
        calibration.key_sensitivity[layer][plan.key_bits, plan.key_axis]
        + calibration.value_sensitivity[layer][plan.value_bits]
    )
