"""Checks of the kernels that read pages: the pool has the reference's bits, and attention is that of float64.

They run on a GPU, and anywhere in Triton's interpreter, as `kernel_checks` do:

    TRITON_INTERPRET=1 python -m tests.page_checks
"""

from __future__ import annotations

import dataclasses
import mmap
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pmkvq_compiler.runtime.kernels import LayerKernels, Tuning
from pmkvq_compiler.runtime.layer_cache import record_views
from pmkvq_compiler.runtime.plan import LayerPlan
from pmkvq_compiler.runtime.quantize import decode, unpack
from pmkvq_compiler.runtime.rotation import rotate_heads
from pmkvq_compiler.runtime.vllm.kernels import KernelPages
from pmkvq_compiler.runtime.vllm.layout import TIERS, PagedLayer
from pmkvq_compiler.runtime.vllm.pages import Batch, LayerPages
from pmkvq_compiler.runtime.vllm.tiered import falling

from .kernel_checks import (
    CONSERVATIVE,
    INTERPRETED_BFLOAT16,
    LIBRARY,
    TOLERANCE,
    Case,
    poisoned,
    render_module,
    repair_interpreter,
)
from .runtime.test_attention import reference

POISON = 0xFF
"""Of these bytes every number is a NaN: one that is read without having been written shows."""


@dataclass(frozen=True)
class PagedCase:
    """A layer, and how many new tokens every sequence brings to each step.

    `beginnings` are (taker, giver, tokens): the taker begins with so many tokens of the giver's, in its pages, which
    the giver may fill in the same step. With `tiers`, pages have random ones, and some fall between steps. Where there
    are `two_programs`, each decodes over half of the records of a head.
    """

    layer: Case
    steps: tuple[tuple[int, ...], ...]
    row_block: int = 16
    beginnings: tuple[tuple[int, int, int], ...] = ()
    exact: bool = False
    tuning: Tuning = CONSERVATIVE
    tiers: bool = False
    two_programs: bool = False

    @property
    def sequences(self) -> int:
        return len(self.steps[0])

    def paged(self) -> PagedLayer:
        plan: LayerPlan = self.layer.plan()
        final = {"stages": (), "sink": 0} if self.exact else {"stages": ((plan.key_bits, plan.value_bits),)}
        return PagedLayer(dataclasses.replace(plan, **final), self.layer.heads, self.layer.dtype.itemsize)


class TwoPrograms(KernelPages):
    """A head's records are read by two programs and its rows by another, as where there are many sequences."""

    def _splits(self, sequences: int, registers: int) -> tuple[int, int]:
        return 2, 3


class Pool:
    """Blocks in a random order for the pages and rows of all sequences; who needs one no more gives it back."""

    def __init__(self, case: PagedCase, generator: torch.Generator) -> None:
        self.case, self.layer = case, case.paged()
        self.page_offset, self.row_offset = 5 * 16, 3 * 16
        row_bytes = case.row_block * self.layer.row_bytes
        largest = max(self.page_offset + self.layer.page_bytes, self.row_offset + row_bytes)
        pages, rows = (-(-case.layer.max_len // block) for block in (self.layer.plan.block, case.row_block))
        ids = torch.randperm(case.sequences * (pages + rows), generator=generator).to(torch.int32) + 1
        self.page_table, self.row_table = ids.view(case.sequences, -1).split([pages, rows], dim=1)
        for taker, giver, tokens in case.beginnings:
            for table, block in ((self.page_table, self.layer.plan.block), (self.row_table, case.row_block)):
                table[taker, : tokens // block] = table[giver, : tokens // block]
        most = self.layer.highest_tier - 1 if case.tiers else 0
        blocks = len(ids) + 1
        self.memory = torch.full((blocks * (1 + most), -(-largest // 1024) * 1024), POISON, dtype=torch.uint8)
        self.ties = torch.zeros(len(self.memory), most + 1, dtype=torch.int32)  # as in a pool with other layers
        counts = torch.tensor([tier - 1 for tier in TIERS if tier <= 1 + most])
        counts = counts[torch.randint(len(counts), (blocks, 1), generator=generator)]
        own = torch.arange(most)
        self.ties[:blocks, :most] = torch.where(own < counts, (1 + own) * blocks + torch.arange(blocks)[:, None], 0)
        for others in (self.page_table[:, : self.layer.sink_pages], self.row_table):
            self.ties[others.long()] = 0  # only codes have tiers

    def fall(self, generator: torch.Generator) -> Tensor:
        """What about a third of the pages that have further blocks fall to, as `LayerPages.lower` is told."""
        pages = (self.ties[:, 0] > 0).nonzero().flatten()
        pages = pages[torch.rand(len(pages), generator=generator) < 1 / 3]
        before = (self.ties[pages] > 0).sum(1)
        after = torch.where(torch.rand(len(pages), generator=generator) < 1 / 2, before // 2, 0)
        kept = torch.arange(self.ties.shape[1]) < after[:, None]
        return torch.cat([pages[:, None], torch.where(kept, self.ties[pages], 0)], dim=1)

    def note(self, told: Tensor) -> None:
        """Pages have fallen. Nothing reads the blocks that they have given away."""
        pages = told[:, 0]
        given = torch.where(told[:, 1:] == 0, self.ties[pages], 0)
        self.memory[given[given > 0].long()] = POISON
        self.ties[pages] = told[:, 1:].int()

    def place(self, memory: Tensor) -> dict[str, Any]:
        """Where the layer lies in these blocks, as its classes want to know."""
        if self.layer.exact:
            return {"pages": memory, "page_offset": self.page_offset}
        rows = {"rows": memory, "row_offset": self.row_offset, "row_block": self.case.row_block}
        ties = {"ties": self.ties.to(memory.device)} if self.case.tiers else {}
        return {"pages": memory, "page_offset": self.page_offset, **rows, **ties}

    def enter(self, sequence: int, cached: int, end: int) -> None:
        """A chunk comes. Those of its rows that no later step reads have no place."""
        kept = max(0, end - self.layer.window + 1) // self.case.row_block
        self.row_table[sequence, -(-cached // self.case.row_block) : kept] = 0

    def leave(self, sequence: int, end: int) -> None:
        """Take back what no token behind these sees."""
        takers = {taker: tokens for taker, _, tokens in self.case.beginnings}
        if takers and sequence not in takers:
            return  # somebody else may need it
        plan = self.layer.plan
        tables = [(self.row_table, self.layer.window, self.case.row_block)]
        if plan.sliding_window is not None:
            tables.append((self.page_table, plan.sliding_window, plan.block))
        for table, window, block in tables:
            gone = slice(takers.get(sequence, 0) // block, max(0, end - window + 1) // block)
            self.memory[table[sequence, gone].long()] = POISON
            table[sequence, gone] = 0


@poisoned()
def run_case(case: PagedCase, device: torch.device, seed: int = 0) -> list[float]:
    """Feed the case's steps; the relative error of every step's output. The pool is the reference's to the last bit."""
    generator = torch.Generator().manual_seed(seed)
    pool, layer, dtype = Pool(case, generator), case.paged(), case.layer.dtype
    kernels = LayerKernels(render_module(case.layer, paged=True), case.tuning)
    query_heads, channels = case.layer.heads * case.layer.group, case.layer.head_dim

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    shape = case.sequences, case.layer.max_len, case.layer.heads, channels
    tokens = torch.cat([draw(*shape) + 2 * draw(channels), draw(*shape)], -1).to(dtype)
    tokens[0, 68:136, :, :channels] *= 1e-5  # a block whose keys are the same, but for less than fp16 holds
    tokens[0, 132:200] = 0
    lengths = [0] * case.sequences
    for taker, giver, count in case.beginnings:
        tokens[taker, :count] = tokens[giver, :count]
        lengths[taker] = count
    sinks = draw(query_heads).to(dtype) if case.layer.has_sinks else None
    scale = channels**-0.5
    errors = []
    for counts in case.steps:
        cached, lengths = lengths, [length + count for length, count in zip(lengths, counts, strict=True)]
        for sequence, end in enumerate(lengths):
            pool.enter(sequence, cached[sequence], end)
        batch = batch_of(pool, counts, lengths)
        new = torch.cat([own[start:end] for own, start, end in zip(tokens, cached, lengths, strict=True)])
        keys, values = new.split(channels, dim=-1)
        queries = draw(len(new), query_heads, channels).to(dtype)
        memory, twin = pool.memory.to(device, copy=True), pool.memory.clone()

        kind = TwoPrograms if case.two_programs else KernelPages
        ours = kind(layer, kernels, dtype, max(lengths), **pool.place(memory))
        out = torch.full((len(new), query_heads, channels), float("nan"), dtype=dtype, device=device)
        moved = [part.to(device) for part in (queries, keys, values)]
        ours.attend_batch(*moved, on(device, batch), scale, None, None if sinks is None else sinks.to(device), out)
        theirs, plain = LayerPages.of(layer, dtype, **pool.place(twin)), out.float().cpu()
        theirs.attend_batch(queries.float(), keys, values, batch, scale, case.layer.softcap, sinks, plain)

        pool.memory = memory.cpu()
        differing = (pool.memory != twin).nonzero()
        assert not len(differing), f"{len(differing)} bytes differ, the first in block {differing[0].tolist()}"
        expected = torch.cat(
            [
                dense(pool, sequence, tokens[sequence, :end], part, scale, sinks)
                for sequence, (end, part) in enumerate(zip(lengths, queries.split(counts), strict=True))
            ]
        )
        torch.testing.assert_close(plain.double(), expected, rtol=1e-4, atol=1e-5)
        assert out.isfinite().all()
        errors.append(((out.cpu().double() - expected).norm() / expected.norm()).item())
        for sequence, end in enumerate(lengths):
            pool.leave(sequence, end)
        if case.tiers:
            told = pool.fall(generator)
            memory = pool.memory.to(device, copy=True)
            for one in falling([kind(layer, kernels, dtype, max(lengths), **pool.place(memory))]):
                one.lower(told.to(device))
            LayerPages.of(layer, dtype, **pool.place(pool.memory)).lower(told)
            assert torch.equal(memory.cpu(), pool.memory), "pages fall to the reference's, and touch nothing else"
            pool.note(told)
    return errors


def batch_of(pool: Pool, counts: Sequence[int], lengths: Sequence[int]) -> Batch:
    several = [sequence for sequence, count in enumerate(counts) if count > 1]
    starts = torch.tensor([0, *counts]).cumsum(0).to(torch.int32)
    places = list(zip(starts.tolist(), starts[1:].tolist(), lengths, strict=False))
    return Batch(
        starts=starts,
        lengths=torch.tensor(lengths, dtype=torch.int32),
        page_table=pool.page_table,
        row_table=pool.page_table if pool.layer.exact else pool.row_table,
        longest_new=max(counts),
        longest=max(lengths),
        several=range(several[0], several[-1] + 1) if several else range(0),
        single=1 in counts,
        known=places[several[0] : several[-1] + 1] if several else (),
    )


def on(device: torch.device, batch: Batch) -> Batch:
    """Tables keep their strides, which are not their widths."""
    wide = torch.cat([batch.page_table, batch.row_table], dim=1).to(device)
    tables = wide.split([batch.page_table.shape[1], batch.row_table.shape[1]], dim=1)
    starts, lengths = batch.starts.to(device), batch.lengths.to(device)
    moved = {"starts": starts, "lengths": lengths, "page_table": tables[0], "row_table": tables[1], "orders": {}}
    return dataclasses.replace(batch, **moved)


def dense(pool: Pool, sequence: int, tokens: Tensor, queries: Tensor, scale: float, sinks: Tensor | None) -> Tensor:
    """Attention of a sequence's last `queries` [n, Hq, d] in float64: [n, Hq, d]. What it sees as codes is taken from
    the pool, everything else from `tokens` [T, H, 2 d], which are those that were fed."""
    layer, plan, end = pool.layer, pool.layer.plan, len(tokens)
    blocks = 0 if layer.exact else layer.whole_blocks(end)
    pages = pool.page_table[sequence, layer.sink_pages : layer.sink_pages + blocks].long()
    numbers = [page_numbers(pool, page) for page in pages.tolist()]
    shape = (layer.heads, 0, tokens.shape[-1] // 2)
    coded = [torch.cat([tokens.new_zeros(shape).double(), *parts], 1) for parts in zip(*numbers, strict=True)]
    exact = tokens.double().transpose(0, 1).chunk(2, dim=-1)
    coded = coded or [part[:, :0] for part in exact]
    keys, values = (torch.cat((one, other), 1).nan_to_num() for one, other in zip(coded, exact, strict=True))
    own = torch.arange(end - len(queries), end).unsqueeze(-1)
    limit = torch.tensor([0 if layer.exact else layer.quantized_until(int(one)) for one in own]).unsqueeze(-1)
    sink = 0 if layer.exact else plan.sink
    codes, rest = plan.sink + torch.arange(blocks * plan.block), torch.arange(end)
    visible = torch.cat([codes < limit, ((rest >= limit) | (rest < sink)) & (rest <= own)], dim=1)
    if plan.sliding_window is not None:
        visible &= torch.cat([codes, rest]) > own - plan.sliding_window
    q = queries.transpose(0, 1)
    return reference(q, keys, values, visible, scale, pool.case.layer.softcap, sinks).transpose(0, 1)


def page_numbers(pool: Pool, page: int) -> tuple[Tensor, Tensor]:
    """What the codes of a page stand for, keys and values [H, block, d] in float64."""
    layer, plan = pool.layer, pool.layer.plan
    further = pool.ties[page, : layer.highest_tier - 1] if pool.case.tiers else pool.ties[page, :0]
    blocks = [page, *further[further > 0].tolist()]
    raw = pool.memory[blocks, pool.page_offset :][:, : layer.page_bytes].unflatten(1, (layer.heads, -1))
    record = plan.record.nbytes(plan.key_bits, plan.value_bits)
    parts = record_views(raw[..., :record].transpose(0, 1), plan, plan.key_bits, plan.value_bits)
    key_bits, value_bits = plan.key_bits * len(blocks), plan.value_bits * len(blocks)
    lines = parts.key_codes.flatten(1).unflatten(1, (plan.block, -1)).contiguous()
    keys = unpack(lines.view(torch.int16), key_bits)
    values = unpack(parts.value_codes.contiguous().view(torch.int16), value_bits).transpose(-1, -2).flatten(1, 2)
    key_groups = parts.key_parameters[:, 0].unsqueeze(1 if parts.key_by_channel else -1)
    value_groups = parts.value_parameters[:, 0].unsqueeze(-1)
    return decode(keys, key_groups, key_bits).double(), decode(values, value_groups, value_bits).double()


def check_rotation(case: Case, device: torch.device) -> None:
    """Keys and queries, which lie side by side as projections do, are turned as `rotate_heads` does it in float64."""
    generator = torch.Generator().manual_seed(0)
    tokens, query_heads, channels = 19, case.heads * case.group, case.head_dim
    both = torch.randn(tokens, query_heads + case.heads, channels, generator=generator).to(case.dtype)
    turns = torch.linalg.qr(torch.randn(case.heads, channels, channels, generator=generator)).Q.contiguous()
    pages = KernelPages(
        PagedLayer(case.plan(), case.heads, case.dtype.itemsize),
        LayerKernels(render_module(case, paged=True), case.tuning),
        case.dtype,
        case.max_len,
        torch.zeros(1, 1024, dtype=torch.uint8, device=device),
        0,
        rotation=turns.to(device),
    )
    found = pages._rotated(*both.to(device).split([query_heads, case.heads], dim=1), turns.to(device))
    for part, one in zip(found, both.double().split([query_heads, case.heads], dim=1), strict=True):
        expected = rotate_heads(one.transpose(0, 1)[None], turns.double())[0].transpose(0, 1).to(case.dtype)
        torch.testing.assert_close(part.cpu(), expected, rtol=2**-7, atol=1e-5)


def check_far_blocks(case: PagedCase, device: torch.device) -> None:
    """Blocks are found where a pool is so large that their bytes are counted in more than 32 bits. The first 8 GiB of
    it are never touched, and on a CPU take no memory."""
    generator = torch.Generator().manual_seed(0)
    pool, layer, plan = Pool(case, generator), case.paged(), case.layer

    def draw(new: int) -> list[Tensor]:
        heads = (plan.heads * plan.group, plan.heads, plan.heads)
        return [torch.randn(new, count, plan.head_dim, generator=generator).to(plan.dtype) for count in heads]

    first, counts = case.steps
    history = draw(sum(first))
    LayerPages.of(layer, plan.dtype, **pool.place(pool.memory)).attend_batch(
        history[0].float(), *history[1:], batch_of(pool, first, first), 1.0, None, None, history[0].float()
    )
    lengths = [old + new for old, new in zip(first, counts, strict=True)]
    batch = batch_of(pool, counts, lengths)
    queries, keys, values = (part.to(device) for part in draw(sum(counts)))
    kernels, blocks = LayerKernels(render_module(plan, paged=True), case.tuning), len(pool.memory)
    found = []
    for far in (0, -(-(8 << 30) // pool.memory.shape[1])):
        memory, ties = (_behind(far, part, device) for part in (pool.memory, pool.ties))
        ties[far:][ties[far:] > 0] += far
        tables = [torch.where(part > 0, part + far, 0) for part in (batch.page_table, batch.row_table)]
        moved = on(device, dataclasses.replace(batch, page_table=tables[0], row_table=tables[1]))
        place = {**pool.place(memory), "ties": ties}
        out = torch.zeros_like(queries)
        KernelPages(layer, kernels, plan.dtype, 400, **place).attend_batch(
            queries, keys, values, moved, plan.head_dim**-0.5, None, None, out
        )
        found.append((out.cpu(), memory[far : far + blocks].cpu()))
    assert found[0][0].isfinite().all()
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)


def check_graph(case: PagedCase, device: torch.device) -> None:
    """A graph that was captured behind a step of the same batch reads pages where they lie when it is replayed."""
    generator = torch.Generator().manual_seed(0)
    pool, layer, plan = Pool(case, generator), case.paged(), case.layer
    first, counts = case.steps
    lengths = [old + new for old, new in zip(first, counts, strict=True)]

    def draw(new: int) -> list[Tensor]:
        heads = (plan.heads * plan.group, plan.heads, plan.heads)
        return [torch.randn(new, count, plan.head_dim, generator=generator).to(plan.dtype) for count in heads]

    memory = pool.memory.to(device)
    place = pool.place(memory)
    plain = LayerPages.of(layer, plan.dtype, **place)
    kernels = LayerKernels(render_module(plan, paged=True), case.tuning)
    ours = KernelPages(layer, kernels, plan.dtype, max(lengths), **place)
    out = torch.empty(sum(first), plan.heads * plan.group, plan.head_dim, dtype=plan.dtype, device=device)
    given = [part.to(device) for part in draw(sum(first))]
    ours.attend_batch(*given, on(device, batch_of(pool, first, first)), 1.0, None, None, out)
    given, batch, out = (
        [part.to(device) for part in draw(sum(counts))],
        on(device, batch_of(pool, counts, lengths)),
        out[: sum(counts)],
    )
    ours.attend_batch(*given, batch, 1.0, None, None, out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ours.attend_batch(*given, batch, 1.0, None, None, out)
    told = pool.fall(generator).to(device)
    assert len(told)
    plain.lower(told)
    place["ties"][told[:, 0]] = told[:, 1:].int()
    graph.replay()
    expected = torch.empty_like(out, dtype=torch.float32)
    plain.attend_batch(given[0].float(), *given[1:], batch, 1.0, None, None, expected)
    assert ((out - expected).norm() / expected.norm()).item() < TOLERANCE


def _behind(far: int, part: Tensor, device: torch.device) -> Tensor:
    """A copy of rows behind so many others, which hold nothing."""
    shape = (far + len(part), part.shape[1])
    if device.type == "cpu":
        size = shape[0] * shape[1] * part.element_size()
        moved = torch.frombuffer(mmap.mmap(-1, size), dtype=part.dtype).view(shape)
    else:
        moved = torch.empty(shape, dtype=part.dtype, device=device)
    moved[far:] = part
    return moved


FAR = [
    PagedCase(Case(key_bits=bits, value_bits=bits, key_axis="channel", head_dim=64), ((330, 200), (1, 70)), tiers=True)
    for bits in (2, 4)
]


SMALL = [
    PagedCase(
        Case(key_axis="token", key_bits=2, value_bits=4, group=3, heads=2), ((70, 130), (1, 65), (62, 1), (1, 1)), 8
    ),
    PagedCase(Case(), ((130, 1, 70), (1, 1, 1)), beginnings=((1, 0, 128), (2, 0, 128))),
    PagedCase(Case(sink=1), ((127, 0), (1, 1), (1, 1)), beginnings=((1, 0, 128),)),
    PagedCase(Case(sink=70, window=100), ((60, 20), (1, 70), (100, 1), (1, 70)), 4),
    PagedCase(Case(sliding_window=100, window=64, softcap=5.0, has_sinks=True), ((90, 240), (1, 1), (70, 1), (1, 60))),
    PagedCase(Case(sliding_window=70, head_dim=80), ((90, 1), (1, 65), (50, 1), (1, 1)), exact=True),
    PagedCase(Case(dtype=torch.float32, key_bits=8), ((100, 1), (1, 90))),
    PagedCase(Case(sink=70, window=64, sliding_window=100), ((163, 20), (1, 143), (2, 1), (1, 2))),
    PagedCase(Case(heads=2, group=2, has_sinks=True), ((200, 90), (70, 100), (1, 66)), tuning=LIBRARY),
    PagedCase(Case(key_bits=2, value_bits=2, group=3), ((200, 70), (1, 1), (1, 65)), tiers=True),
]
"""For the interpreter, which is slow."""

LONG = [
    PagedCase(
        Case(key_bits=2, value_bits=2, group=1, max_len=2510), ((2500,), (1,), (1,)), tiers=True, two_programs=True
    )
]
"""For the interpreter, where there is time."""

MORE = [
    *SMALL,
    PagedCase(Case(key_bits=4, value_bits=2, key_axis="token"), ((270,), (1,), (1,)), tuning=LIBRARY, tiers=True),
    PagedCase(Case(), ((150, 1, 0), (1, 70, 0), (1, 1, 90), (1, 1, 1))),
    PagedCase(
        Case(head_dim=80, group=3, key_bits=2, value_bits=2, block=128, window=128, dtype=torch.bfloat16),
        ((270,), (1,), (1,)),
        32,
    ),
    PagedCase(Case(key_bits=16, value_bits=8, window=90, sink=0), ((70, 65, 1), (1, 1, 1), (60, 2, 1))),
    PagedCase(Case(), ((90, 1), (1, 65), (1, 1)), exact=True),
    PagedCase(Case(heads=2), ((90, 70), (65, 1)), tuning=dataclasses.replace(CONSERVATIVE, prefill_scratch=1 << 16)),
]


ROTATED = [Case(head_dim=80, group=3, heads=2, dtype=torch.float32), Case(heads=2, group=1)]


if __name__ == "__main__":
    repair_interpreter()
    torch.set_num_threads(1)
    for case in ROTATED:
        check_rotation(case, torch.device("cpu"))
    if not sys.argv[1:]:
        check_far_blocks(FAR[0], torch.device("cpu"))
    every = [*SMALL, *LONG]
    for number in [int(argument) for argument in sys.argv[1:]] or range(len(SMALL)):
        found = run_case(every[number], torch.device("cpu"))
        tolerance = INTERPRETED_BFLOAT16 if every[number].layer.dtype == torch.bfloat16 else TOLERANCE
        assert max(found) < tolerance, f"case {number}: errors {found}"
        print(f"case {number}: {max(found):.1e}", flush=True)
