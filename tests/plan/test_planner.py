"""The plan is optimal, true to the byte, and what each recipe promises."""

from __future__ import annotations

import itertools
import random
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pulp
import pytest
import torch

from pmkvq_compiler.calibrate.calibration import Calibration
from pmkvq_compiler.calibrate.layer_outputs import LayerOutputs
from pmkvq_compiler.errors import CompileError, UsageError
from pmkvq_compiler.formats import Format
from pmkvq_compiler.options import CompileOptions
from pmkvq_compiler.passes.program import AttentionSite
from pmkvq_compiler.plan.candidates import Candidate, candidates
from pmkvq_compiler.plan.charged import FED_AT_ONCE, charged_bytes
from pmkvq_compiler.plan.knapsack import choose, total_bytes, undominated
from pmkvq_compiler.plan.layer_plans import lowering_stages
from pmkvq_compiler.plan.propose import propose, solve
from pmkvq_compiler.plan.solution import plan_table
from pmkvq_compiler.problem import Problem, resolve
from pmkvq_compiler.recipes import RECIPES
from pmkvq_compiler.runtime.plan import CODE_BITS, CachePlan, LayerPlan, longest, sequence_bytes
from pmkvq_compiler.runtime.vllm.layout import paged_layers, pool_of
from pmkvq_compiler.unquantized import cache_bytes_at_16_bits

MAX_LEN = 2048


def site(layer: int, **overrides: Any) -> AttentionSite:
    """An attention of 9 query and 3 key heads of 64 channels."""
    shape = AttentionSite(
        layer=layer,
        node=f"attention_{layer}",
        num_attention_heads=9,
        num_key_value_heads=3,
        key_head_dim=64,
        value_head_dim=64,
        scale=0.125,
        sliding_window=None,
        softcap=None,
        has_sinks=False,
        query=None,
        key=None,
        value=None,
        reason=None,
    )
    return replace(shape, **overrides)


def calibration(layers: int, seed: int = 0) -> Calibration:
    """Sensitivities as they are measured: layers far apart, twice the bits a fraction, channels below tokens."""
    draw = random.Random(seed)
    weight = [draw.lognormvariate(0, 1.5) for _ in range(layers)]
    noise = {layer: draw.uniform(0.3, 0.9) for layer in range(layers)}
    error = {2: 5.0, 4: 1.0, 8: 0.06}
    windows = {64: 1.3, 128: 1.0, 256: 0.8}
    keys = {
        layer: {
            Format(bits, axis, transform, window): weight[layer]
            * error[bits]
            * (noise[layer] if axis == "channel" else 1.0)
            * windows[window]
            for bits in error
            for axis, transform in (("token", "none"), ("token", "scale"), ("token", "rotate"), ("channel", "none"))
            for window in windows
        }
        for layer in range(layers)
    }
    values = {
        layer: {
            Format(bits, "token", transform, window): weight[layer] * noise[layer] * error[bits] * windows[window]
            for bits in error
            for transform in ("none", "rotate")
            for window in windows
        }
        for layer in range(layers)
    }
    return Calibration(
        fingerprint="",
        key_maxima={},
        alphas={},
        scales={},
        key_matrices={},
        value_matrices={},
        key_loss=keys,
        value_loss=values,
        key_gradient=keys,
        value_gradient=values,
        check_ids=torch.zeros(1, 1, dtype=torch.int64),
        check_logits=torch.zeros(1, 1),
        check_layers=LayerOutputs(torch.zeros(1, 1)),
    )


def options(**chosen: Any) -> CompileOptions:
    return CompileOptions(model="model", output=Path("out"), **chosen)


def problem(
    sites: list[AttentionSite],
    budget: int | None,
    max_len: int = MAX_LEN,
    dtype: torch.dtype = torch.float16,
    **chosen: Any,
) -> Problem:
    """What these options ask for within `budget` bytes."""
    return resolve(options(budget=None if budget is None else f"{budget}bytes", **chosen), sites, max_len, dtype)


def planned(sites: list[AttentionSite], budget: int | None, **chosen: Any) -> CachePlan:
    return solve(problem(sites, budget, **chosen), calibration(len(sites))).plan


def random_candidates(draw: random.Random, count: int) -> list[Candidate]:
    plan = planned([site(0)], None, recipe="none").layers[0]
    return [
        Candidate(plan, 16 * draw.randint(1000, 90_000), draw.choice([0.0, draw.lognormvariate(0, 3)]))
        for _ in range(count)
    ]


def total(chosen: tuple[Candidate, ...] | list[Candidate]) -> tuple[int, float]:
    return sum(c.size for c in chosen), sum(c.sensitivity for c in chosen)


@pytest.mark.parametrize("seed", range(25))
def test_the_solver_finds_what_exhaustive_search_finds(seed: int) -> None:
    draw = random.Random(seed)
    layers = [random_candidates(draw, draw.randint(1, 7)) for _ in range(draw.randint(1, 5))]
    smallest = sum(min(c.size for c in layer) for layer in layers)
    largest = sum(max(c.size for c in layer) for layer in layers)
    budget = draw.randint(smallest, largest)

    best = min(total(row)[1] for row in itertools.product(*layers) if total(row)[0] <= budget)
    size, sensitivity = total(choose([undominated(layer) for layer in layers], budget, total_bytes))
    assert size <= budget
    assert sensitivity == pytest.approx(best, rel=1e-6, abs=1e-12)


def alike(layers: int, spread: float, seed: int = 0) -> list[list[Candidate]]:
    """Layers with the same 30 sizes, whose sensitivities differ by a factor of about 1 + `spread`."""
    draw, (plan,) = random.Random(seed), planned([site(0)], None, recipe="none").layers
    sizes = [(bits, window) for bits in (2, 3, 4, 5, 6, 8) for window in range(5)]
    return [
        [
            Candidate(
                plan,
                64 * (10 * bits + 3 * window),
                4.0**-bits * (1 - 0.07 * window) * draw.lognormvariate(0, spread),
            )
            for bits, window in sizes
        ]
        for _ in range(layers)
    ]


def least_sensitivity(layers: list[list[Candidate]], capacity: int) -> float:
    """The optimum for `capacity` units of 64 bytes, from a table with a row for each layer."""
    best = [0.0] * (capacity + 1)
    for layer in layers:
        sizes = [(candidate.size // 64, candidate.sensitivity) for candidate in layer]
        best = [
            min((best[units - size] + loss for size, loss in sizes if size <= units), default=float("inf"))
            for units in range(capacity + 1)
        ]
    return best[capacity]


@pytest.mark.parametrize("ending", [KeyboardInterrupt, pulp.PulpSolverError])
def test_a_solver_that_does_not_end_leaves_no_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: type[BaseException]
) -> None:
    written = []

    def end(solver: Any, *arguments: Any) -> None:
        written.extend(path.suffix for path in tmp_path.rglob("*-pulp.*"))
        raise ending

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(pulp.PULP_CBC_CMD, "readsol_MPS", end)
    with pytest.raises(CompileError if ending is pulp.PulpSolverError else ending):
        choose(alike(3, 0.1), 64 * 150, total_bytes)
    assert {*written} == {".mps", ".sol"}
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("spread", [0.0, 0.01, 0.1])
@pytest.mark.parametrize("layers", [1, 2, 28])
def test_the_best_plan_is_found_even_if_all_layers_are_alike(layers: int, spread: float) -> None:
    choices, capacity = alike(layers, spread), 37 * layers
    size, sensitivity = total(choose([undominated(layer) for layer in choices], 64 * capacity, total_bytes))
    assert size <= 64 * capacity
    assert sensitivity == pytest.approx(least_sensitivity(choices, capacity), rel=1e-6)


@pytest.mark.parametrize("share", [0.22, 0.25, 0.3, 0.4, 0.6])
def test_a_plan_uses_the_budget_up_to_97_percent(share: float) -> None:
    sites = [site(layer) for layer in range(24)]
    budget = int(cache_bytes_at_16_bits(sites, MAX_LEN, 1) * share)
    plan = planned(sites, budget)
    assert 0.97 * budget <= plan.arena_bytes <= budget


@pytest.mark.parametrize("seed", range(8))
def test_a_small_plan_is_the_exhaustive_one_and_uses_97_percent_of_its_bytes(seed: int) -> None:
    sites, measured = [site(layer) for layer in range(3)], calibration(3, seed)
    budget = random.Random(seed).randint(*(int(cache_bytes_at_16_bits(sites, MAX_LEN, 1) * x) for x in (0.25, 0.6)))
    layers = candidates(problem(sites, budget), measured)
    best = min((row for row in itertools.product(*layers) if total(row)[0] <= budget), key=lambda row: total(row)[1])

    solution = solve(problem(sites, budget), measured)
    rows = plan_table(solution, sites, measured)
    assert sum(row.sensitivity for row in rows) == pytest.approx(total(best)[1], rel=1e-6)
    assert 0.97 * total(best)[0] <= solution.plan.arena_bytes <= budget


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("batch_size", [1, 4])
def test_an_infeasible_budget_names_the_smallest_feasible_one_to_the_byte(recipe: Any, batch_size: int) -> None:
    sites = [site(0), site(1, sliding_window=300)]
    with pytest.raises(CompileError, match="smallest feasible") as caught:
        planned(sites, 1000, recipe=recipe, batch_size=batch_size)
    smallest = int(str(caught.value).split(" is ")[1].split(" bytes")[0].replace(",", ""))
    assert planned(sites, smallest, recipe=recipe, batch_size=batch_size).arena_bytes == smallest
    with pytest.raises(CompileError):
        planned(sites, smallest - 1, recipe=recipe, batch_size=batch_size)


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_arenas_hold_the_sequences_they_were_planned_for(recipe: Any) -> None:
    sites = [site(0), site(1, sliding_window=300), site(2, key_head_dim=96, value_head_dim=80)]
    budget = cache_bytes_at_16_bits(sites, MAX_LEN, 3)
    plan = planned(sites, budget if RECIPES[recipe].quantizes else None, recipe=recipe, batch_size=3)
    assert longest(plan, 3, itemsize=2) == MAX_LEN
    assert [layer.arena_bytes for layer in plan.layers] == [
        3 * sequence_bytes(layer, MAX_LEN, 2) for layer in plan.layers
    ]


def test_pm_kvq_shares_bits_groups_by_token_and_lowers_k_and_v_together() -> None:
    sites = [site(layer) for layer in range(8)]
    plan = planned(sites, cache_bytes_at_16_bits(sites, MAX_LEN, 1) // 3, recipe="pm-kvq")
    assert len({layer.key_bits for layer in plan.layers}) > 1
    for layer in plan.layers:
        assert layer.key_bits == layer.value_bits
        assert (layer.key_axis, layer.sink, layer.window) == ("token", 1, 128)
        assert all(key == value for key, value in layer.stages)
        assert layer.stages[0] == (16, 16)


def test_uniform_takes_the_widest_width_that_fits_at_once() -> None:
    sites = [site(layer) for layer in range(8)]
    plan = planned(sites, int(cache_bytes_at_16_bits(sites, MAX_LEN, 1) * 0.45), recipe="uniform")
    assert {layer.stages for layer in plan.layers} == {((4, 4),)}


SERVED: dict[str, tuple[list[AttentionSite], dict[str, Any]]] = {
    "alike": ([site(layer) for layer in range(24)], {}),
    "many sequences": ([site(layer) for layer in range(12)], {"batch_size": 16}),
    "sliding": ([site(layer, sliding_window=None if layer % 3 else 512) for layer in range(12)], {"max_len": 16384}),
    "wide values, float32": ([site(layer, value_head_dim=96) for layer in range(6)], {"dtype": torch.float32}),
    "one choice for all": ([site(layer) for layer in range(12)], {"recipe": "uniform", "batch_size": 4}),
    "windows of one length": ([site(layer) for layer in range(12)], {"recipe": "pm-kvq", "batch_size": 4}),
}


def served_bytes(plan: CachePlan) -> int:
    """Bytes of vLLM's cache that the plan's sequences take."""
    pool = pool_of(paged_layers(plan, getattr(torch, plan.dtype).itemsize), plan.max_len)
    return pool.bytes_needed(plan.batch_size, plan.max_len, FED_AT_ONCE)


@pytest.mark.parametrize("name", SERVED)
@pytest.mark.parametrize("share", [0.3, 0.45])
def test_a_plan_for_a_server_fits_its_pages_into_the_budget_and_wastes_little(name: str, share: float) -> None:
    sites, chosen = SERVED[name]
    whole = cache_bytes_at_16_bits(sites, chosen.get("max_len", MAX_LEN), chosen.get("batch_size", 1))
    budget = int(whole * share * chosen.get("dtype", torch.float16).itemsize / 2)
    plan, other = (planned(sites, budget, serve=serve, **chosen) for serve in (True, False))
    assert plan.budget == budget >= max(served_bytes(plan), plan.arena_bytes)
    assert served_bytes(other) > budget or chosen.get("recipe") == "uniform", "or it would need no option"
    if chosen.get("recipe") != "uniform":
        assert served_bytes(plan) > 0.85 * budget


@pytest.mark.parametrize("name", ["many sequences", "sliding"])
def test_hardly_a_better_plan_for_a_server_is_missed(name: str) -> None:
    """No program for any share of the budget has one, but for what its blocks happen to leave empty."""
    sites, chosen = SERVED[name]
    whole = cache_bytes_at_16_bits(sites, chosen.get("max_len", MAX_LEN), chosen.get("batch_size", 1))
    asked, measured = problem(sites, int(0.45 * whole), serve=True, **chosen), calibration(len(sites))
    layers = [undominated(layer) for layer in candidates(asked, measured)]

    def taken(chosen: Sequence[Candidate]) -> int:
        return charged_bytes(asked, [candidate.plan for candidate in chosen])

    budget = asked.budget or 0
    fitting = [choose(layers, budget * share // 100, total_bytes) for share in range(80, 101)]
    best = min(total(one)[1] for one in fitting if taken(one) <= budget)
    assert total(choose(layers, budget, taken))[1] <= 1.15 * best


@pytest.mark.parametrize("recipe", [name for name, recipe in RECIPES.items() if recipe.quantizes])
def test_a_server_that_is_too_small_is_told_the_smallest_to_the_byte(recipe: Any) -> None:
    sites, chosen = [site(0), site(1, sliding_window=300)], {"recipe": recipe, "batch_size": 3, "serve": True}
    with pytest.raises(CompileError, match="smallest feasible") as caught:
        planned(sites, 1000, **chosen)
    smallest = int(str(caught.value).split(" is ")[1].split(" bytes")[0].replace(",", ""))
    assert served_bytes(planned(sites, smallest, **chosen)) <= smallest
    with pytest.raises(CompileError):
        planned(sites, smallest - 1, **chosen)


def test_none_keeps_every_token_and_needs_no_budget() -> None:
    plan = planned([site(0), site(1, sliding_window=256)], None, recipe="none")
    assert [layer.window for layer in plan.layers] == [MAX_LEN, 256 + 64]
    assert not any(layer.quantized for layer in plan.layers)
    assert plan.budget == plan.arena_bytes


def test_none_has_no_pages_to_plan() -> None:
    with pytest.raises(UsageError, match="--serve"):
        planned([site(0)], None, recipe="none", serve=True)


def test_every_other_recipe_needs_a_budget() -> None:
    with pytest.raises(UsageError, match="--budget"):
        planned([site(0)], None)


def test_a_budget_for_everything_leaves_everything_exact() -> None:
    sites = [site(0), site(1)]
    plan = planned(sites, cache_bytes_at_16_bits(sites, MAX_LEN, 1))
    assert not any(layer.quantized for layer in plan.layers)


def test_a_sliding_window_layer_has_no_sink_and_pays_for_its_window_alone() -> None:
    sites = [site(0), site(1, sliding_window=512)]
    plan = planned(sites, int(cache_bytes_at_16_bits(sites, MAX_LEN, 1) * 0.3))
    assert plan.layers[1].sink == 0
    assert plan.layers[1].arena_bytes < plan.layers[0].arena_bytes


def test_a_window_longer_than_the_sequences_shrinks_to_them() -> None:
    sites = [site(0)]
    solution = solve(problem(sites, 10**9, 100, recipe="uniform", window=512), calibration(1))
    assert solution.plan.layers[0].sink + solution.plan.layers[0].window == 100
    assert plan_table(solution, sites, calibration(1))[0].sensitivity == 0


def test_the_layer_that_matters_most_gets_the_most_bytes() -> None:
    sites, measured = [site(layer) for layer in range(6)], calibration(6)
    measured.key_loss[4].update({key: 100 * value for key, value in measured.key_loss[4].items()})
    solution = solve(problem(sites, int(cache_bytes_at_16_bits(sites, MAX_LEN, 1) * 0.3)), measured)
    rows = plan_table(solution, sites, measured)
    assert max(rows, key=lambda row: row.key_bits).layer == 4
    assert [row.arena_bytes for row in rows] == [layer.arena_bytes for layer in solution.plan.layers]


def test_long_caches_are_also_planned_for_as_if_windows_held_less_of_them() -> None:
    """Windows help much in the texts: one plan believes that, another saves them where the cache is far longer."""
    sites, measured = [site(layer) for layer in range(6)], calibration(6)
    helped = {64: 1.0, 128: 0.3, 256: 0.1}
    for losses in (*measured.key_loss.values(), *measured.value_loss.values()):
        losses.update({kept: loss * helped[kept.window] for kept, loss in losses.items()})
    budget = int(cache_bytes_at_16_bits(sites, MAX_LEN, 1) * 0.3)

    def window_tokens(calib_len: int) -> list[int]:
        proposals = propose(problem(sites, budget, calib_len=calib_len), measured)
        assert all(one.plan.arena_bytes <= budget for one in proposals)
        return [sum(layer.window for layer in one.plan.layers) for one in proposals]

    as_long, short = window_tokens(MAX_LEN), window_tokens(MAX_LEN // 16)
    assert set(as_long) < set(short)
    assert min(short) < 0.7 * min(as_long)


@pytest.mark.parametrize("final", list(itertools.product(CODE_BITS, repeat=2)))
def test_stages_halve_the_wider_width_first_and_end_at_the_final_ones(final: tuple[int, int]) -> None:
    stages = lowering_stages(*final, together=False)
    assert (stages[0], stages[-1]) == ((16, 16), final)
    for (key, value), lowered in itertools.pairwise(stages):
        assert lowered in ((key // 2, value), (key, value // 2))
        assert (lowered[1] < value) == (value > final[1] and (value >= key or key == final[0]))


@pytest.mark.parametrize(
    ("chosen", "named"),
    [
        ({"window": 32}, "window 32"),
        ({"sink": -1}, "sink -1"),
        ({"block": 40}, "block of 40"),
        ({"bits": (8, 3)}, r"\[3\]"),
        ({"bits": ()}, "none"),
    ],
)
def test_options_that_no_cache_can_have_are_wrong_usage(chosen: dict[str, Any], named: str) -> None:
    with pytest.raises(UsageError, match=named):
        planned([site(0)], 10**9, **chosen)


def test_keys_too_narrow_to_pack_are_an_error_that_says_so() -> None:
    with pytest.raises(CompileError, match="the 4 channels of a key"):
        planned([site(0, key_head_dim=4)], 10**9, bits=(2,))


def test_a_plan_for_a_70b_llama_uses_its_budget() -> None:
    sites = [site(layer, num_attention_heads=64, num_key_value_heads=8, key_head_dim=128) for layer in range(80)]
    budget = int(cache_bytes_at_16_bits(sites, 32768, 1) * 0.2)
    plan = solve(problem(sites, budget, 32768, torch.bfloat16), calibration(80)).plan
    assert 0.97 * budget <= plan.arena_bytes <= budget


def test_a_plan_survives_json() -> None:
    sites = [site(0), site(1)]
    plan = planned(sites, int(cache_bytes_at_16_bits(sites, MAX_LEN, 1) * 0.3))
    assert CachePlan.from_json(plan.to_json()) == plan
    assert all(isinstance(layer, LayerPlan) for layer in plan.layers)
