"""Caches that are never quantized. Budgets are shares of their size, and some recipes let layers stay like that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from pmkvq_compiler.passes.program import AttentionSite, attention_layers
from pmkvq_compiler.runtime.plan import CachePlan, LayerPlan, StatePlan, original_bytes, sequence_bytes


def exact_layer(site: AttentionSite, max_len: int, block: int, itemsize: int) -> LayerPlan:
    """The plan of a layer that is never quantized: its window holds every token that a query can see.

    A full window drops a whole block, so a sliding-window layer needs one block more than its queries see. The plan's
    `arena_bytes` are still 0, because they depend on the number of sequences.
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
        chunked=site.chunked,
    )


def exact_plan(
    sites: Sequence[AttentionSite],
    max_len: int,
    batch_size: int,
    dtype: torch.dtype,
    block: int,
    states: tuple[StatePlan, ...] = (),
) -> CachePlan:
    """The plan that keeps every number of every layer in `dtype`, beside the model's `states`."""
    exact = [exact_layer(site, max_len, block, dtype.itemsize) for site in sites]
    layers = tuple(
        replace(layer, arena_bytes=batch_size * sequence_bytes(layer, max_len, dtype.itemsize)) for layer in exact
    )
    reserved = sum(layer.arena_bytes for layer in layers)
    name = str(dtype).removeprefix("torch.")
    return CachePlan("none", reserved, max_len, batch_size, name, layers, attention_layers(sites), states)


def cache_bytes_at_16_bits(sites: Sequence[AttentionSite], max_len: int, batch_size: int) -> int:
    """Bytes of the whole cache at 16 bits a number. Budgets in percent or bits are shares of it."""
    return sum(batch_size * original_bytes(exact_layer(site, max_len, block=0, itemsize=2), max_len) for site in sites)
