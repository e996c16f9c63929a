"""Pages that lie in several blocks and have wide codes, and fall to fewer and narrower ones at any time."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from pmkvq_compiler.runtime.plan import LayerPlan
from pmkvq_compiler.runtime.quantize import decode, encode, group_parameters
from pmkvq_compiler.runtime.vllm.layout import TIERS, PagedLayer, bits_of
from pmkvq_compiler.runtime.vllm.pages import LayerPages

from .test_attention import reference
from .test_pages import ATTENTION, HEADS, LENGTH, POISON, Paged, layer_plan, random_tokens


@pytest.mark.parametrize("bits", [2, 4])
def test_the_upper_bits_of_a_wide_code_are_the_narrow_code(bits: int) -> None:
    x = torch.randn(50, 64, generator=torch.Generator().manual_seed(bits)) * torch.logspace(-9, 4, 50).unsqueeze(1)
    parameters = group_parameters(x, -1)
    for wide in (8, 4):
        assert torch.equal(encode(x, parameters, wide) >> wide - bits, encode(x, parameters, bits))


PLANS = {
    "K by channel": layer_plan(key_bits=2, value_bits=2, key_axis="channel"),
    "K by token": layer_plan(key_bits=2, value_bits=2),
    "K and V of other widths": layer_plan(key_bits=4, value_bits=2, key_axis="channel"),
    "a sliding window with a sink longer than a block": layer_plan(
        sliding_window=70, sink=70, window=40, key_bits=2, value_bits=4
    ),
    "4 bits": layer_plan(key_bits=4, value_bits=4),
}


class Tiered(Paged):
    """Pages have the tiers that a test gives them, in further blocks, of which every page may have as many as it can;
    random ones at first."""

    def __init__(self, plan: LayerPlan, sequences: int, seed: int = 0) -> None:
        super().__init__(plan, sequences, seed)
        self.random = random.Random(seed)
        most, blocks = self.layer.highest_tier - 1, len(self.memory)
        self.further = torch.arange(blocks * most, dtype=torch.int32).view(blocks, most) + blocks
        more = torch.full((blocks * most, self.memory.shape[1]), POISON, dtype=torch.uint8)
        self.memory = torch.cat([self.memory, more])
        self.ties = torch.zeros(len(self.memory), most, dtype=torch.int32)
        self.coded = torch.cat([table[self.layer.sink_pages :] for table in self.page_tables]).tolist()
        for page in self.coded:
            self.have(page, self.random.choice([tier for tier in TIERS if tier <= most + 1]))
        rows = [group for group in self.pool.groups if group.kind == "rows"]
        self.pages = LayerPages.of(self.layer, torch.float32, self.memory, 0, self.memory, 0, rows[0].block, self.ties)

    def have(self, page: int, tier: int) -> None:
        self.ties[page] = torch.where(torch.arange(self.ties.shape[1]) < tier - 1, self.further[page], 0)

    def tier(self, page: int) -> int:
        return 1 + int((self.ties[page] > 0).sum())

    def fall(self, tiers: dict[int, int]) -> None:
        """Pages fall to these tiers. What they give away is somebody else's at once."""
        told = torch.zeros(len(tiers), 1 + self.ties.shape[1], dtype=torch.int64)
        for row, (page, tier) in zip(told, tiers.items(), strict=True):
            row[0], row[1:tier] = page, self.further[page, : tier - 1]
        self.pages.lower(told)
        for page, tier in tiers.items():
            self.memory[self.ties[page, tier - 1 : self.tier(page) - 1].long()] = POISON
            self.have(page, tier)

    def numbers(self, table: Tensor, tokens: Tensor, bits: int, by_channel: bool) -> Tensor:
        """What codes of the blocks in these pages stand for: `tokens` [H, T, d] of K or V in float64."""
        plan, found = self.layer.plan, tokens.double().clone()
        for block in range(self.layer.whole_blocks(tokens.shape[1])):
            own = slice(plan.sink + block * plan.block, plan.sink + (block + 1) * plan.block)
            wide = bits * self.tier(int(table[block + self.layer.sink_pages]))
            parameters = group_parameters(tokens[:, own], -2 if by_channel else -1)
            found[:, own] = decode(encode(tokens[:, own], parameters, wide), parameters, wide).double()
        return found


@pytest.mark.parametrize("name", PLANS)
def test_attention_reads_every_page_at_the_tier_that_it_has(name: str) -> None:
    plan = PLANS[name]
    paged = Tiered(plan, 2)
    tokens = [random_tokens(plan, seed) for seed in (1, 2)]
    start = 0
    for size in (130, 1, 32, 50, 1, 19):
        own, tables = slice(start, start + size), [table.clone() for table in paged.page_tables]
        found = paged.step({number: tuple(part[:, own] for part in parts) for number, parts in enumerate(tokens)})
        start += size
        for sequence, (q, k, v) in enumerate(tokens):
            expected = dense(paged, tables[sequence], q[:, own], k[:, :start], v[:, :start])
            torch.testing.assert_close(found[sequence].double(), expected, rtol=1e-4, atol=2e-5)
        higher = [page for page in paged.coded if paged.tier(page) > 1 and paged.random.random() < 1 / 6]
        paged.fall({page: paged.random.choice([t for t in TIERS if t < paged.tier(page)]) for page in higher})
    assert start == LENGTH
    assert bool((paged.ties > 0).any()), "some pages have kept some further blocks"


def dense(paged: Tiered, table: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
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


@pytest.mark.parametrize("name", [name for name, plan in PLANS.items() if plan.sliding_window is None])
def test_a_page_that_has_fallen_is_one_that_was_written_so(name: str) -> None:
    plan = PLANS[name]
    q, k, v = random_tokens(plan)
    highest = PagedLayer(plan, HEADS, 4).highest_tier
    for before, after in [(high, low) for high in TIERS for low in TIERS if low < high <= highest]:
        fallen, written = Tiered(plan, 1), Tiered(plan, 1)
        for paged, tier in ((fallen, before), (written, after)):
            for page in paged.coded:
                paged.have(page, tier)
            paged.step({0: (q, k, v)})
        fallen.fall(dict.fromkeys(fallen.coded, after))
        assert torch.equal(fallen.memory, written.memory), f"from {before} to {after}"


def test_a_block_that_is_another_page_meanwhile_is_left_alone() -> None:
    """It is written in this step. Its new further blocks may be what other pages, which fall now, are read from."""
    plan = PLANS["K by channel"]
    q, k, v = random_tokens(plan)
    paged = Tiered(plan, 1)
    for page in paged.coded:
        paged.have(page, 4)
    paged.step({0: (q, k, v)})
    page, other = paged.coded[:2]
    before = paged.memory.clone()
    paged.pages.lower(torch.tensor([[page, int(paged.further[other, 2]), 0, 0]]))
    assert torch.equal(paged.memory, before)


def test_bits_of_a_page_grow_with_its_tier_up_to_eight() -> None:
    def bits(**changes: Any) -> dict[int, float]:
        return bits_of([PagedLayer(layer_plan(key_head_dim=16, value_head_dim=16, **changes), HEADS, 2)])

    assert bits(key_bits=2, value_bits=2) == {1: 2, 2: 4, 4: 8}
    assert bits(key_bits=4, value_bits=2) == {1: 3, 2: 6}
    assert bits(key_bits=8, value_bits=4) == {1: 6}
    assert bits(key_bits=16, value_bits=8) == {1: 12}
