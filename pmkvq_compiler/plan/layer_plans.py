"""The cache layouts that a recipe allows for each layer. They are known before anything is measured."""

from __future__ import annotations

import math
from dataclasses import replace

from pmkvq_compiler.errors import CompileError
from pmkvq_compiler.passes.program import AttentionSite
from pmkvq_compiler.problem import Problem
from pmkvq_compiler.recipes import Recipe
from pmkvq_compiler.runtime.plan import CODE_BITS, KeyAxis, LayerPlan, fitted, sequence_bytes
from pmkvq_compiler.runtime.quantize import WORD_BITS
from pmkvq_compiler.unquantized import exact_layer


def candidate_plans(problem: Problem) -> list[list[LayerPlan]]:
    """The plans that the recipe allows for each layer. Formats and losses, which need a calibration, are not in them.

    Raises `CompileError` if no allowed width can be packed.
    """
    recipe, max_len, itemsize = problem.recipe, problem.max_len, problem.dtype.itemsize
    choices = _choices(problem)
    layers = []
    for site in problem.sites:
        plans = [_quantized(site, recipe, max_len, *choice) for choice in choices]
        if recipe.exact_layers:
            plans.insert(0, exact_layer(site, max_len, recipe.block, itemsize))
        layers.append(
            [replace(plan, arena_bytes=problem.batch_size * sequence_bytes(plan, max_len, itemsize)) for plan in plans]
        )
    return layers


def _choices(problem: Problem) -> list[tuple[int, int, KeyAxis, int]]:
    """All (K bits, V bits, K axis, window) that the recipe allows; the codes of a key must fill whole words."""
    recipe = problem.recipe
    if not recipe.quantizes:
        return []
    channels = math.gcd(*(site.key_head_dim for site in problem.sites))
    widths = [bits for bits in sorted(problem.bits, reverse=True) if channels * bits % WORD_BITS == 0]
    if not widths:
        raise CompileError(
            f"the {channels} channels of a key do not fill {WORD_BITS}-bit words at any of {problem.bits} bits; allow "
            f"wider --bits"
        )
    return [
        (key, value, axis, window)
        for key in widths
        for value in ([key] if recipe.same_bits else widths)
        for axis in recipe.key_axes
        for window in recipe.windows
    ]


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
        chunked=site.chunked,
    )
    return fitted(plan, max_len)


def lowering_stages(key_bits: int, value_bits: int, together: bool) -> tuple[tuple[int, int], ...]:
    """The (K, V) widths from 16 bits down to the final ones. K and V are halved `together` or one at a time.

    One at a time, the wider one is halved first. If they are equal, V goes first, because K needs its bits more.
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
