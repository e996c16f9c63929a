"""Attention over pages of packed blocks and rows of recent tokens, in plain PyTorch.

Every sequence has two tables: the blocks of the pool in which its pages lie, and those in which its rows lie. Block 0
is nobody's; where a table names it, nothing is kept. A step has three phases, each for all sequences before the next
begins, since one sequence may begin with pages that another one fills in this very step: new tokens are written, blocks
that are whole now are quantized, and queries attend.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from ..layer_cache import Records, record_views
from ..plan import block_bytes
from ..quantize import encode, group_parameters, lower
from ..reference import SCORES, UNPACKED_NUMBERS, softmax
from .codes import KINDS, Chunk, read_codes, records_of, write_codes
from .layout import PagedLayer

NOBODY = 0
"""The block that no sequence owns."""


@dataclass(frozen=True)
class Step:
    """What one sequence brings to a step: `keys` [H, n, key_head_dim] and `values` [H, n, value_head_dim] of new
    tokens, how many were there before (`cached`), and its tables (int, one block an entry)."""

    keys: Tensor
    values: Tensor
    cached: int
    page_table: Tensor
    row_table: Tensor

    @property
    def end(self) -> int:
        return self.cached + self.keys.shape[1]

    def fresh(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Those of the new tokens that are at positions `start` to `stop`."""
        own = slice(max(0, start - self.cached), max(0, stop - self.cached))
        return self.keys[:, own], self.values[:, own]


@dataclass(frozen=True)
class Batch:
    """What all sequences bring to a step: their new tokens lie one after another. Those of sequence `b` are `starts[b]`
    to `starts[b + 1]`, and `lengths[b]` counts its tokens with them (int32, [B + 1] and [B]); some have none. Tables
    [B, blocks] (int32) name the blocks of their pages and rows.

    What the host knows: no sequence brings more than `longest_new` tokens or has more than `longest`; only those in the
    range `several` bring more than one, and there are others unless not `single`. Of each in that range it may know the
    place of its new tokens in the batch, and its length with them: `known` are (start, stop, length).

    In `orders` kernels keep what they have found for the first layer of a step and need for the others.
    """

    starts: Tensor
    lengths: Tensor
    page_table: Tensor
    row_table: Tensor
    longest_new: int
    longest: int
    several: range
    single: bool
    known: Sequence[tuple[int, int, int]] = ()
    orders: dict[Any, Tensor] = field(default_factory=dict)

    @property
    def count(self) -> int:
        return len(self.lengths)


class Attends(Protocol):
    """The pages and rows of one layer, over which a batch attends."""

    def attend_batch(
        self,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        batch: Batch,
        scale: float,
        softcap: float | None,
        sinks: Tensor | None,
        out: Tensor,
    ) -> None:
        """Keep the batch's `keys` [T, H, key_head_dim] and `values` [T, H, value_head_dim], and write causal attention
        of its `queries` [T, Hq, key_head_dim] to `out` [T, Hq, value_head_dim]. `sinks` [Hq] are logits that carry no
        value."""


class LayerPages:
    """The pages and rows of one layer: views of a pool.

    `pages` [N, H, bytes] (uint8) are the layer's part of every block, should the block hold pages, and `rows` [N, H,
    tokens, key_head_dim + value_head_dim] the part of every block that holds rows. An exact layer has no rows, and its
    pages hold tokens.
    """

    def __init__(
        self,
        layer: PagedLayer,
        pages: Tensor,
        rows: Tensor | None,
        dtype: torch.dtype,
        ties: Tensor | None = None,
    ) -> None:
        self.layer, self.plan, self.dtype = layer, layer.plan, dtype
        self.pages, self.rows = pages, rows
        none = pages.new_empty(len(pages), 0, dtype=torch.int32)
        self.ties = none if ties is None else ties[:, : layer.highest_tier - 1]
        tokens = self.plan.block if layer.exact else min(self.plan.sink, self.plan.block)
        exact = pages[..., : tokens * layer.token_bytes].view(dtype)
        self.exact = exact.unflatten(-1, (tokens, -1)) if tokens else None
        """Tokens in pages as they are: all of an exact layer, the sink of any other."""
        self.record = block_bytes(self.plan, self.plan.key_bits, self.plan.value_bits)

    @classmethod
    def of(
        cls,
        layer: PagedLayer,
        dtype: torch.dtype,
        pages: Tensor,
        page_offset: int,
        rows: Tensor | None = None,
        row_offset: int = 0,
        row_block: int = 0,
        ties: Tensor | None = None,
    ) -> LayerPages:
        """The layer's views of a pool that is seen as blocks of pages and as blocks of rows, [N, block_bytes] (uint8)
        each, in which the layer begins at these bytes. A block of rows has `row_block` tokens."""
        own = pages[:, page_offset : page_offset + layer.page_bytes].unflatten(-1, (layer.heads, -1))
        if rows is None:
            return cls(layer, own, None, dtype, ties)
        kept = rows[:, row_offset : row_offset + row_block * layer.row_bytes].view(dtype)
        return cls(layer, own, kept.unflatten(-1, (layer.heads, row_block, -1)), dtype, ties)

    def attend_batch(
        self,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        batch: Batch,
        scale: float,
        softcap: float | None,
        sinks: Tensor | None,
        out: Tensor,
    ) -> None:
        """`Attends.attend_batch`, a phase at a time, from sequence to sequence."""
        q, k, v = (part.transpose(0, 1) for part in (queries, keys, values))
        starts, lengths = batch.starts.tolist(), batch.lengths.tolist()
        steps = {}
        for number, length in enumerate(lengths):
            own = slice(starts[number], starts[number + 1])
            if own.start < own.stop:
                cached = length - (own.stop - own.start)
                tables = batch.page_table[number], batch.row_table[number]
                steps[own.start] = Step(k[:, own], v[:, own], cached, *tables)
        for step in steps.values():
            self.write_tokens(step)
        for step in steps.values():
            self.write_blocks(step)
        for start, step in steps.items():
            own = slice(start, start + step.keys.shape[1])
            out[own] = self.attend(q[:, own], step, scale, softcap, sinks).transpose(0, 1)

    # ---- the first two phases: write ----

    def write_tokens(self, step: Step) -> None:
        """Keep the new tokens wherever there is a place for them as they are."""
        both = torch.cat([step.keys, step.values], dim=-1).to(self.dtype)
        if self.exact is not None:
            last = step.end if self.layer.exact else min(self.plan.sink, step.end)
            if last > step.cached:
                self._put(self.exact, step.page_table, self.plan.block, both, step.cached, last)
        if self.rows is not None:
            self._put(self.rows, step.row_table, self.rows.shape[2], both, step.cached, step.end)

    def write_blocks(self, step: Step) -> None:
        """Quantize the blocks that the new tokens complete; their earlier tokens are among the rows."""
        if self.layer.exact:
            return
        first, last = self.layer.whole_blocks(step.cached), self.layer.whole_blocks(step.end)
        pages = step.page_table[self.layer.pages_between(step.cached, step.end)].long()
        kept = pages != NOBODY
        if not bool(kept.any()):
            return
        start, stop = (self.plan.sink + block * self.plan.block for block in (first, last))
        keys, values = (part.unflatten(1, (last - first, -1))[:, kept] for part in self._as_they_are(step, start, stop))
        key_dim = -2 if self.plan.key_axis == "channel" else -1
        key_groups, value_groups = group_parameters(keys, key_dim), group_parameters(values, -1)
        for own, blocks in self._by_tier(pages[kept]):
            key_bits, value_bits = self.layer.widths(blocks.shape[1])
            raw = self._raw(blocks)
            records = self._views(raw)
            records.key_parameters[:, :, 0] = key_groups[:, own].squeeze(key_dim)
            records.value_parameters[:, :, 0] = value_groups[:, own].squeeze(-1)
            write_codes(records, encode(keys[:, own], key_groups[:, own], key_bits), key_bits, "key")
            write_codes(records, encode(values[:, own], value_groups[:, own], value_bits), value_bits, "value")
            self.pages[blocks, :, : self.record] = raw.movedim(0, 2)

    @torch.inference_mode()
    def lower(self, told: Tensor) -> None:
        """Re-code pages that lie in fewer blocks than before: `told` [n, most + 1] (int64) are their blocks and
        those of their further blocks from now on, 0 where they have none. Those of before are in `ties`.

        A page is left alone where it keeps other blocks than its first ones: it is another page meanwhile.
        """
        pages = told[:, 0]
        before = self.ties[pages]
        after = torch.zeros_like(before)
        after[:, : told.shape[1] - 1] = told[:, 1 : 1 + before.shape[1]]
        stay = ((after == before) | (after == NOBODY)).all(1) & (after != before).any(1)
        for own, blocks in self._by_tier(pages[stay]):
            counts = 1 + (after[stay][own] != NOBODY).sum(1)
            for tier in counts.unique().tolist():
                self._fall(blocks[counts == tier], tier)

    def _fall(self, blocks: Tensor, tier: int) -> None:
        """Re-code pages that lie in `blocks` [n, tier of before] to lie in the first `tier` of these."""
        wide, narrow = self.layer.widths(blocks.shape[1]), self.layer.widths(tier)
        records = self._views(self._raw(blocks))
        kept = self._raw(blocks[:, :tier])
        for kind, bits, target in zip(KINDS, wide, narrow, strict=True):
            write_codes(self._views(kept), lower(read_codes(records, bits, kind), bits, target), target, kind)
        self.pages[blocks[:, :tier], :, : self.record] = kept.movedim(0, 2)

    def _by_tier(self, pages: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Of each tier which of the pages have it, and their blocks [n, tier]."""
        if not self.ties.shape[1]:
            yield torch.arange(len(pages), device=pages.device), pages[:, None]
            return
        blocks = torch.cat([pages[:, None], self.ties[pages].long()], dim=1)
        tiers = (blocks[:, 1:] != NOBODY).sum(1) + 1
        for tier in tiers.unique().tolist():
            own = (tiers == tier).nonzero().flatten()
            yield own, blocks[own, :tier]

    def _raw(self, blocks: Tensor) -> Tensor:
        """A copy of what lies in blocks [n, tier]: [H, n, tier, bytes]."""
        return self.pages[blocks, :, : self.record].movedim(2, 0)

    def _views(self, raw: Tensor) -> Records:
        """The fields of blocks, as they lie where codes have their final bits."""
        return record_views(raw, self.plan, self.plan.key_bits, self.plan.value_bits)

    # ---- the third: attend ----

    def attend(
        self, queries: Tensor, step: Step, scale: float, softcap: float | None = None, sinks: Tensor | None = None
    ) -> Tensor:
        """Causal attention of `queries` [Hq, n, key_head_dim] of the step's new tokens: [Hq, n, value_head_dim].

        A query sees the sink and its most recent tokens as they are and codes of all between (see
        `PagedLayer.quantized_until`). `sinks` [Hq] are logits that carry no value.
        """
        compute = torch.promote_types(queries.dtype, torch.float32)
        grouped = (queries * scale).to(compute).unflatten(0, (step.keys.shape[0], -1))
        tile = max(1, SCORES // (queries.shape[0] * step.end))
        parts = [
            self._attend_tile(grouped[:, :, first : first + tile], step, step.cached + first, softcap, sinks)
            for first in range(0, queries.shape[1], tile)
        ]
        return torch.cat(parts, dim=2).flatten(0, 1).to(queries.dtype)

    def _attend_tile(
        self, queries: Tensor, step: Step, first: int, softcap: float | None, sinks: Tensor | None
    ) -> Tensor:
        """Grouped and scaled `queries` [Hkv, G, s, dk] at the positions from `first` on, to [Hkv, G, s, dv]."""
        layer, plan = self.layer, self.plan
        _, group, count, _ = queries.shape
        flat, end = queries.flatten(1, 2), first + count
        seen = 0 if plan.sliding_window is None else max(0, first - plan.sliding_window + 1)
        if layer.exact:
            sink, blocks, recent = range(0), range(0), seen
        else:
            sink = range(min(seen, plan.sink), min(plan.sink, end))  # a page that nobody sees may be another's
            quantized = (layer.quantized_until(end - 1) - plan.sink) // plan.block
            blocks = range(min(quantized, max(0, seen - plan.sink) // plan.block), quantized)
            recent = min(end, max(seen, layer.quantized_until(first)))  # a sink's own tokens are the sink
        old = self._take(self.exact, step.page_table, plan.block, sink.start, sink.stop) if sink else None
        near_keys, near_values = self._as_they_are(step, recent, end)
        chunks = self._chunks(step, blocks)
        pieces = [] if old is None else [flat @ old[0].to(flat.dtype).transpose(1, 2)]
        pieces += [chunk.key_scores(flat) for chunk in chunks]
        pieces.append(flat @ near_keys.to(flat.dtype).transpose(1, 2))
        scores = torch.cat(pieces, dim=-1).unflatten(1, (group, count))
        visible = self._visible(first, count, sink, blocks, recent)
        weights = softmax(scores, visible, softcap, sinks).flatten(1, 2)
        out: Tensor = weights[..., weights.shape[-1] - near_values.shape[1] :] @ near_values.to(flat.dtype)
        if old is not None:
            out += weights[..., : len(sink)] @ old[1].to(flat.dtype)
        done = len(sink)
        for chunk in chunks:
            tokens = chunk.pages * plan.block
            out += chunk.value_sums(weights[..., done : done + tokens])
            done += tokens
        return out.unflatten(1, (group, count))

    def _visible(self, first: int, count: int, sink: range, blocks: range, recent: int) -> Tensor | None:
        """Mask [count, T] of what each query sees of these tokens of the sink, the blocks and the tokens from `recent`
        on; None where all see all."""
        plan, device = self.plan, self.pages.device
        if count == 1 and plan.sliding_window is None:
            return None
        queries = torch.arange(first, first + count, device=device)
        codes = torch.arange(blocks.start * plan.block, blocks.stop * plan.block, device=device) + plan.sink
        near = torch.arange(recent, first + count, device=device)
        limits = [0 if self.layer.exact else self.layer.quantized_until(first + one) for one in range(count)]
        limit = torch.tensor(limits, device=device).unsqueeze(-1)
        allowed = [torch.ones(count, len(sink), dtype=torch.bool, device=device), codes < limit, near >= limit]
        positions = torch.cat([torch.arange(sink.start, sink.stop, device=device), codes, near])
        visible = torch.cat(allowed, dim=1) & (positions <= queries.unsqueeze(-1))
        if plan.sliding_window is None:
            return visible
        return visible & (positions > queries.unsqueeze(-1) - plan.sliding_window)

    def _chunks(self, step: Step, blocks: range) -> list[Chunk]:
        """The pages of these blocks, as many at a time as should be unpacked at once."""
        plan = self.plan
        numbers = self.layer.heads * plan.block * max(plan.key_head_dim, plan.value_head_dim)
        at_once = max(1, UNPACKED_NUMBERS // numbers)
        pages = step.page_table[blocks.start + self.layer.sink_pages : blocks.stop + self.layer.sink_pages].long()
        return [self._chunk(some) for some in pages.split(at_once) if len(some)]

    def _chunk(self, pages: Tensor) -> Chunk:
        tiers = [
            (own, records_of(self._views(self._raw(blocks)), *self.layer.widths(blocks.shape[1])))
            for own, blocks in self._by_tier(pages)
        ]
        return Chunk(len(pages), tiers)

    def _as_they_are(self, step: Step, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Keys and values at positions `start` to `stop`: those of earlier steps from where they are kept."""
        fresh = step.fresh(start, stop)
        if start >= step.cached:
            return fresh
        stop = min(stop, step.cached)
        if self.rows is None:
            kept = self._take(self.exact, step.page_table, self.plan.block, start, stop)
        else:
            kept = self._take(self.rows, step.row_table, self.rows.shape[2], start, stop)
        return torch.cat([kept[0], fresh[0]], dim=1), torch.cat([kept[1], fresh[1]], dim=1)

    def _take(self, place: Tensor | None, table: Tensor, block: int, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Keys and values [H, stop - start, d] of tokens that are kept as they are."""
        assert place is not None
        positions = torch.arange(start, stop, device=table.device)
        both = place[table[positions // block].long(), :, positions % block].transpose(0, 1)
        return both[..., : self.plan.key_head_dim], both[..., self.plan.key_head_dim :]

    def _put(self, place: Tensor, table: Tensor, block: int, both: Tensor, start: int, stop: int) -> None:
        """Keep `both` [H, n, dk + dv], whose first token is at `start`, up to `stop` where the table has a block."""
        positions = torch.arange(start, stop, device=table.device)
        owners = table[positions // block].long()
        kept = owners != NOBODY
        place[owners[kept], :, positions[kept] % block] = both[:, : len(positions)][:, kept].transpose(0, 1)
