"""The caches that a layer may have, before anything is measured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from pmkvq_compiler.errors import CompileError
from pmkvq_compiler.options import CompileOptions
from pmkvq_compiler.passes.program import AttentionSite
from pmkvq_compiler.recipes import Recipe, resolved
from pmkvq_compiler.runtime.plan import (
    CODE_BITS,
    KeyAxis,
    LayerPlan,
    fitted,
    original_bytes,
    sequence_bytes,
)
from pmkvq_compiler.runtime.quantize import WORD_BITS

if TYPE_CHECKING:
    pass


def cache_bytes_at_16_bits(sites: Sequence[AttentionSite], max_len: int, batch_size: int) -> int:
    """Bytes of the whole cache at 16 bits a number: what budgets in percent and bits are shares of."""
    return sum(batch_size * original_bytes(exact_plan(site, max_len, block=0, itemsize=2), max_len) for site in sites)


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


def candidate_plans(
    sites: Sequence[AttentionSite], options: CompileOptions, max_len: int, dtype: torch.dtype
) -> list[list[LayerPlan]]:
    """The plans of `candidates`, but for what depends on a calibration."""
    recipe, choices = resolved(options), _choices(sites, options)
    layers = []
    for site in sites:
        plans = [_quantized(site, recipe, max_len, *choice) for choice in choices]
        if recipe.exact_layers:
            plans.insert(0, exact_plan(site, max_len, recipe.block, dtype.itemsize))
        layers.append(
            [
                replace(plan, arena_bytes=options.batch_size * sequence_bytes(plan, max_len, dtype.itemsize))
                for plan in plans
            ]
        )
    return layers


def exact_plan(site: AttentionSite, max_len: int, block: int, itemsize: int) -> LayerPlan:
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
