"""Attention over pages is that of the single-process cache, whatever is fed together and wherever blocks lie."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from pmkvq_compiler.runtime.attention import cached_attention
from pmkvq_compiler.runtime.cache import Cache
from pmkvq_compiler.runtime.plan import CachePlan, LayerPlan, blocks_needed, sequence_bytes
from pmkvq_compiler.runtime.vllm.layout import PagedLayer, pool_of
from pmkvq_compiler.runtime.vllm.pages import NOBODY, LayerPages, Step

HEADS, GROUP, LENGTH = 2, 3, 233


def layer_plan(**changes: Any) -> LayerPlan:
    """A layer at its final bits."""
    values: dict[str, Any] = {
        "num_key_value_heads": HEADS,
        "key_head_dim": 16,
        "value_head_dim": 24,
        "key_bits": 4,
        "value_bits": 2,
        "key_axis": "token",
        "sink": 4,
        "window": 64,
        "block": 32,
        "sliding_window": None,
        "arena_bytes": 0,
    }
    values |= changes
    values.setdefault("stages", ((values["key_bits"], values["value_bits"]),))
    plan = LayerPlan(**values)
    return dataclasses.replace(plan, arena_bytes=sequence_bytes(plan, LENGTH, 4))


PLANS = {
    "narrow": layer_plan(key_bits=2, value_bits=2, key_axis="channel"),
    "wide": layer_plan(key_bits=8, value_bits=8),
    "codes of 16 bits": layer_plan(key_bits=16, value_bits=16),
    "no sink": layer_plan(sink=0),
    "a sink longer than a block": layer_plan(sink=40, window=70),
    "a window of one block": layer_plan(window=32, sink=1),
    "a window that is no multiple": layer_plan(window=50, sink=5, key_axis="channel"),
    "a sliding window": layer_plan(sliding_window=100, sink=0),
    "a sliding window with a sink": layer_plan(sliding_window=100, sink=6, window=40),
    "a sliding window with a sink longer than a block": layer_plan(sliding_window=70, sink=70, window=40),
    "a sliding window and channels": layer_plan(sliding_window=90, sink=33, window=40, key_axis="channel"),
    "a sliding window within the window": layer_plan(sliding_window=30, sink=0),
    "never quantized": layer_plan(stages=(), key_bits=32, value_bits=32, sink=0, window=LENGTH),
    "never quantized, sliding": layer_plan(
        stages=(), key_bits=32, value_bits=32, sink=0, window=132, sliding_window=100
    ),
}


POISON = 0xFF
"""Of these bytes every number is a NaN."""


class Paged:
    """One layer in a pool whose blocks are handed out in a random order, for sequences of tables. Blocks are poisoned
    until something is written into them, and again when no later token sees what they hold."""

    def __init__(self, plan: LayerPlan, sequences: int, seed: int = 0) -> None:
        self.layer = PagedLayer(plan, plan.num_key_value_heads, 4)
        self.pool = pool_of([self.layer], LENGTH)
        needed = [sequences * -(-LENGTH // group.block) for group in self.pool.groups]
        self.memory = torch.full((1 + sum(needed), self.pool.block_bytes), POISON, dtype=torch.uint8)
        handed = (torch.randperm(sum(needed), generator=torch.Generator().manual_seed(seed)) + 1).split(needed)
        tables = {g.kind: ids.chunk(sequences) for g, ids in zip(self.pool.groups, handed, strict=True)}
        self.page_tables, self.row_tables = tables["pages"], tables.get("rows", tables["pages"])
        rows = [group for group in self.pool.groups if group.kind == "rows"]
        placed = (self.memory, 0, rows[0].block) if rows else ()
        self.pages = LayerPages.of(self.layer, torch.float32, self.memory, 0, *placed)
        self.lengths = [0] * sequences

    def step(self, tokens: dict[int, tuple[Tensor, Tensor, Tensor]]) -> dict[int, Tensor]:
        """Feed q, k, v of some sequences together."""
        steps = {
            sequence: Step(k, v, self.lengths[sequence], self.page_tables[sequence], self.row_tables[sequence])
            for sequence, (_, k, v) in tokens.items()
        }
        for step in steps.values():
            self.pages.write_tokens(step)
        for step in steps.values():
            self.pages.write_blocks(step)
        for sequence, step in steps.items():
            self.lengths[sequence] = step.end
        found = {
            sequence: self.pages.attend(tokens[sequence][0], step, 0.3, **ATTENTION) for sequence, step in steps.items()
        }
        for sequence in steps:
            self.take_back(sequence)
        return found

    def take_back(self, sequence: int) -> None:
        """Blocks of what no later token of a sequence sees are somebody else's from now on."""
        for group in self.pool.groups:
            table = (self.page_tables if group.kind == "pages" else self.row_tables)[sequence]
            gone = 0 if group.window is None else max(0, self.lengths[sequence] - group.window + 1) // group.block
            self.memory[table[:gone]] = POISON
            table[:gone] = NOBODY


def fed(paged: Paged, q: Tensor, k: Tensor, v: Tensor, chunks: list[int]) -> Tensor:
    """The whole sequence 0, in chunks of these sizes in turn."""
    parts, start = [], 0
    for size in itertools.cycle(chunks):
        own = slice(start, start + size)
        parts.append(paged.step({0: (q[:, own], k[:, own], v[:, own])})[0])
        start += size
        if start >= q.shape[1]:
            return torch.cat(parts, dim=1)
    raise AssertionError


def random_tokens(plan: LayerPlan, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    made = torch.Generator().manual_seed(seed)
    q = torch.randn(HEADS * GROUP, LENGTH, plan.key_head_dim, generator=made)
    k = torch.randn(HEADS, LENGTH, plan.key_head_dim, generator=made)
    return q, k, torch.randn(HEADS, LENGTH, plan.value_head_dim, generator=made)


ATTENTION: dict[str, Any] = {"softcap": 2.0, "sinks": torch.linspace(-1, 1, HEADS * GROUP)}


@functools.cache
def token_by_token(plan: LayerPlan) -> Tensor:
    """What the single-process cache computes."""
    whole = CachePlan("uniform", plan.arena_bytes, LENGTH, 1, "float32", (plan,))
    cache = Cache(whole, 1, None, torch.float32, torch.device("cpu"))
    parts = []
    for token in range(LENGTH):
        q, k, v = (part[None, :, token : token + 1] for part in random_tokens(plan))
        cache.begin([slice(0, 1)])
        parts.append(cached_attention(q, k, v, cache, 0, 0.3, **ATTENTION)[0])
        cache.end()
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("chunks", [[1], [64], [7, 100, 1, 33], [LENGTH]], ids=str)
def test_attention_over_pages_is_that_of_the_cache_fed_token_by_token(name: str, chunks: list[int]) -> None:
    plan = PLANS[name]
    assert blocks_needed(plan, LENGTH) > 0 or "never" in name or "within" in name
    found = fed(Paged(plan, 1), *random_tokens(plan), chunks)
    torch.testing.assert_close(found, token_by_token(plan), rtol=1e-4, atol=1e-5)
