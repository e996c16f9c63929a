"""Planes: the low bits of codes, in blocks of their own, which may be given away at any time."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from pmkvq_compiler.runtime.plan import LayerPlan
from pmkvq_compiler.runtime.quantize import decode, encode, encode_planes, group_parameters, step_and_zero
from pmkvq_compiler.runtime.vllm.layout import PagedLayer, bits_of, planes_of
from pmkvq_compiler.runtime.vllm.pages import LayerPages

from .test_attention import reference
from .test_pages import ATTENTION, HEADS, LENGTH, POISON, Paged, layer_plan, random_tokens


@pytest.mark.parametrize("bits", [2, 4])
def test_a_code_and_its_planes_stand_for_what_the_wide_code_stands_for(bits: int) -> None:
    x = torch.randn(50, 64, generator=torch.Generator().manual_seed(bits)) * torch.logspace(-9, 4, 50).unsqueeze(1)
    parameters, most = group_parameters(x, -1), planes_of(bits)
    planes = [encode(x, parameters, bits), *encode_planes(x, parameters, bits, most)]
    total = torch.zeros(x.shape, dtype=torch.float64)
    for number, codes in enumerate(planes):
        step, zero = (part.double() for part in step_and_zero(parameters, bits, number))
        total += zero + codes * step
        wide = bits * (number + 1)
        expected = decode(encode(x, parameters, wide), parameters, wide).double()
        cell = step_and_zero(parameters, wide)[0].double()
        differing = (total - expected).abs() > 1e-5 * cell
        assert differing.double().mean() < 1e-3, "only where a number lies on the border of two cells"
        assert ((total - expected).abs() <= 1.01 * cell).all()


PLANS = {
    "K by channel": layer_plan(key_bits=2, value_bits=2, key_axis="channel"),
    "K by token": layer_plan(key_bits=2, value_bits=2),
    "K and V of other widths": layer_plan(key_bits=4, value_bits=2, key_axis="channel"),
    "a sliding window with a sink longer than a block": layer_plan(
        sliding_window=70, sink=70, window=40, key_bits=2, value_bits=4
    ),
    "4 bits": layer_plan(key_bits=4, value_bits=4),
}


class Refined(Paged):
    """Every page may have a plane in each of so many further blocks, and random ones have."""

    def __init__(self, plan: LayerPlan, sequences: int, seed: int = 0) -> None:
        super().__init__(plan, sequences, seed)
        self.random = random.Random(seed)
        pages, most = len(self.memory), self.layer.planes
        more = torch.full((pages * most, self.memory.shape[1]), POISON, dtype=torch.uint8)
        self.memory = torch.cat([self.memory, more])
        self.ties = torch.zeros(len(self.memory), most, dtype=torch.int32)
        for page in range(1, pages):
            count = self.random.randrange(most + 1)
            self.ties[page, :count] = torch.arange(count, dtype=torch.int32) + pages + page * most
        rows = [group for group in self.pool.groups if group.kind == "rows"]
        self.pages = LayerPages.of(self.layer, torch.float32, self.memory, 0, self.memory, 0, rows[0].block, self.ties)

    def lower(self) -> None:
        """Give away the last plane of every third page, written or not."""
        for page in range(len(self.memory)):
            count = int((self.ties[page] > 0).sum())
            kept = max(0, count - (self.random.random() < 1 / 3))
            self.memory[self.ties[page, kept:count].long()] = POISON
            self.ties[page, kept:] = 0

    def numbers(self, table: Tensor, tokens: Tensor, bits: int, by_channel: bool) -> Tensor:
        """What codes of the blocks in these pages and their planes stand for: `tokens` [H, T, d] of K or V in
        float64."""
        plan, found = self.layer.plan, tokens.double().clone()
        for block in range(self.layer.whole_blocks(tokens.shape[1])):
            own = slice(plan.sink + block * plan.block, plan.sink + (block + 1) * plan.block)
            page = int(table[block + self.layer.sink_pages])
            wide = bits * (1 + min(int((self.ties[page] > 0).sum()), planes_of(bits)))
            parameters = group_parameters(tokens[:, own], -2 if by_channel else -1)
            found[:, own] = decode(encode(tokens[:, own], parameters, wide), parameters, wide).double()
        return found


@pytest.mark.parametrize("name", PLANS)
def test_attention_reads_every_page_with_the_planes_that_it_has(name: str) -> None:
    plan = PLANS[name]
    paged = Refined(plan, 2)
    tokens = [random_tokens(plan, seed) for seed in (1, 2)]
    start = 0
    for size in (130, 1, 32, 50, 1, 19):
        own, tables = slice(start, start + size), [table.clone() for table in paged.page_tables]
        found = paged.step({number: tuple(part[:, own] for part in parts) for number, parts in enumerate(tokens)})
        start += size
        for sequence, (q, k, v) in enumerate(tokens):
            expected = dense(paged, tables[sequence], q[:, own], k[:, :start], v[:, :start])
            torch.testing.assert_close(found[sequence].double(), expected, rtol=1e-4, atol=2e-5)
        paged.lower()
    assert start == LENGTH
    assert bool((paged.ties > 0).any()), "some pages have kept some planes"


def dense(paged: Refined, table: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of the last tokens in float64, over the sink and the recent tokens as they are and codes between."""
    layer, plan, end = paged.layer, paged.layer.plan, k.shape[1]
    codes = (
        paged.numbers(table, k, plan.key_bits, plan.key_axis == "channel"),
        paged.numbers(table, v, plan.value_bits, False),
    )
    keys, values = (torch.cat([one.double(), other], dim=1) for one, other in zip((k, v), codes, strict=True))
    own = torch.arange(end - q.shape[1], end).unsqueeze(-1)
    limit = torch.tensor([layer.quantized_until(int(one)) for one in own]).unsqueeze(-1)
    position = torch.arange(end)
    as_they_are = ((position >= limit) | (position < plan.sink)) & (position <= own)
    visible = torch.cat([as_they_are, (position >= plan.sink) & (position < limit)], dim=1)
    if plan.sliding_window is not None:
        visible &= torch.cat([position, position]) > own - plan.sliding_window
    return reference(q, keys, values, visible, 0.3, ATTENTION["softcap"], ATTENTION["sinks"])


def test_bits_of_a_page_grow_with_its_planes_up_to_eight() -> None:
    def bits(**changes: Any) -> list[float]:
        return list(bits_of([PagedLayer(layer_plan(key_head_dim=16, value_head_dim=16, **changes), HEADS, 2)]).values())

    assert bits(key_bits=2, value_bits=2) == [2, 4, 8]
    assert bits(key_bits=4, value_bits=2) == [3, 6]
    assert bits(key_bits=8, value_bits=4) == [6]
    assert bits(key_bits=16, value_bits=8) == [12]
