"""Whether any plan can meet a request, before the model is run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from pmkvq_compiler.budget import LARGEST_BYTES
from pmkvq_compiler.errors import CompileError, UsageError
from pmkvq_compiler.options import CompileOptions
from pmkvq_compiler.passes.program import AttentionSite
from pmkvq_compiler.plan.layer_plans import cache_bytes_at_16_bits, candidate_plans
from pmkvq_compiler.recipes import RECIPES, resolved
from pmkvq_compiler.runtime.plan import (
    CODE_BITS,
    LayerPlan,
)
from pmkvq_compiler.runtime.quantize import WORD_BITS

if TYPE_CHECKING:
    pass


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
    smallest = smallest_bytes(candidate_plans(sites, options, max_len, dtype), options)
    if budget is not None and budget < smallest:
        mebibytes = math.ceil(smallest / 2**20 * 100) / 100
        raise CompileError(
            f"a budget of {budget:,} bytes cannot hold {options.batch_size} sequence(s) of {max_len:,} tokens; the "
            f"smallest feasible one with recipe {options.recipe!r} is {smallest:,} bytes ({mebibytes}MiB)"
        )


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


def smallest_bytes(layers: Sequence[Sequence[LayerPlan]], options: CompileOptions) -> int:
    """Bytes of the smallest plan; some recipes take the same choice in every layer."""
    if RECIPES[options.recipe].per_layer:
        return sum(min(plan.arena_bytes for plan in layer) for layer in layers)
    return min(sum(plan.arena_bytes for plan in row) for row in zip(*layers, strict=True))
