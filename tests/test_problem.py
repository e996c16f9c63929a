"""A request is resolved once, and what is wrong with it is said there."""

from __future__ import annotations

import ast
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pmkvq_compiler.errors import UsageError
from pmkvq_compiler.options import CompileOptions
from pmkvq_compiler.problem import resolve
from pmkvq_compiler.recipes import RECIPES
from pmkvq_compiler.unquantized import cache_bytes_at_16_bits
from tests.plan.test_planner import site
from tests.programs import located

DRIVER = Path(__file__).parent.parent / "pmkvq_compiler"
OPTIONS = CompileOptions("model", Path("out"), budget="25%")
SITES = [site(0), site(1, sliding_window=300)]


def calls(name: str) -> Counter[str]:
    """How often each file of the driver calls the function `name`."""
    found: Counter[str] = Counter()
    for path in DRIVER.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == name:
                found[path.relative_to(DRIVER).as_posix()] += 1
    return found


def readers(name: str) -> set[str]:
    """The files of the driver that import `name`."""
    return {
        path.relative_to(DRIVER).as_posix()
        for path in DRIVER.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and name in {alias.name for alias in node.names}
    }


def test_a_recipe_a_budget_and_a_device_are_made_of_the_options_in_one_place() -> None:
    for name in ("resolved", "parse_budget", "pick_device"):
        assert calls(name) == {"problem.py": 1}, name
    assert readers("RECIPES") == {"cli.py"}


def test_what_measures_and_plans_reads_no_options() -> None:
    floors = ("calibrate/", "plan/")
    assert {path for path in readers("CompileOptions") if path.startswith(floors)} == set()


@pytest.mark.parametrize(
    ("budget", "share"), [("25%", 0.25), ("4bits", 0.25), ("1MiB", None), ("1000000bytes", None), ("100%", 1.0)]
)
def test_the_budget_is_in_bytes(budget: str, share: float | None) -> None:
    problem = resolve(replace(OPTIONS, budget=budget, batch_size=3), SITES, 2048, torch.float16)
    original = cache_bytes_at_16_bits(SITES, 2048, 3)
    assert problem.original_bytes == original
    assert problem.budget == {"1MiB": 2**20, "1000000bytes": 10**6}.get(budget, int(original * (share or 0)))


def test_the_users_sink_window_and_block_take_the_place_of_the_recipes() -> None:
    problem = resolve(replace(OPTIONS, sink=0, window=96, block=32), SITES, 2048, torch.float16)
    assert problem.recipe == replace(RECIPES["best"], sink=0, windows=(96,), block=32)
    assert resolve(OPTIONS, SITES, 2048, torch.float16).recipe == RECIPES["best"]


@pytest.mark.parametrize(
    ("chosen", "named"),
    [
        ({"recipe": "worst"}, "no recipe 'worst'; choose among best, pm-kvq"),
        ({"recipe": ""}, "no recipe ''"),
        ({"budget": None}, "recipe 'best' needs a budget"),
        ({"budget": None, "recipe": "kivi"}, "recipe 'kivi' needs a budget"),
        ({"budget": "lots"}, "budget 'lots' is not understood"),
        ({"budget": "0.0001%", "batch_size": 1}, "leaves no byte"),
        ({"window": 32}, "window 32"),
        ({"sink": -1}, "sink -1"),
        ({"block": 40}, "block of 40"),
        ({"bits": (8, 3)}, r"\[3\]"),
        ({"bits": ()}, "none"),
        ({"device": "tpu"}, "device 'tpu'"),
        ({"batch_size": 10**12}, "more than any machine holds"),
    ],
)
def test_options_that_make_no_problem_are_wrong_usage(chosen: dict[str, Any], named: str) -> None:
    sites = [site(0, num_key_value_heads=1, key_head_dim=16, value_head_dim=16)]
    with pytest.raises(UsageError, match=named):
        resolve(replace(OPTIONS, **chosen), sites, 100, torch.float16)


def test_a_recipe_without_formats_needs_no_budget() -> None:
    problem = resolve(replace(OPTIONS, budget=None, recipe="none"), SITES, 2048, torch.float16)
    assert problem.budget is None
    assert not problem.recipe.quantizes


@pytest.mark.parametrize(("dtype", "folds"), [(torch.float32, True), (torch.bfloat16, False), (torch.float16, False)])
def test_weights_that_are_stored_minus_one_are_folded_only_where_they_are_not_rounded(
    dtype: torch.dtype, folds: bool
) -> None:
    for model_type, always in (("gemma3_text", False), ("qwen3", True)):
        for found in resolve(OPTIONS, located(model_type).sites, 512, dtype).sites:
            assert (found.reason is None) == (folds or always)
            assert found.reason is None or "would round after a fold" in found.reason
