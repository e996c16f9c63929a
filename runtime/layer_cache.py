"""The cache of one layer: an arena, allocated once, whose codes are lowered in place when it is full.

An arena holds, for each sequence and head, the rows of sink and window and a pool of quantized blocks; `records`
defines the layout. Sink and window lie together so that one product serves both. Lowering a layer rewrites its records
in fewer bytes, from the front of the pool on; new blocks go where that frees space at the end.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .plan import (
    ALIGNMENT,
    LayerPlan,
    block_bytes,
    blocks_needed,
    buffer_bytes,
    fitted,
    flushed_blocks,
    head_bytes,
)
from .quantize import encode, group_parameters, lower, pack, unpack
from .records import row_numbers

BLOCKS_LOWERED_AT_ONCE = 16


@dataclass(frozen=True)
class Records:
    """Views of n quantized blocks of one sequence, all heads.

    `key_parameters` [H, n, groups] and `value_parameters` [H, n, block] are words (int16, see `quantize`); `key_codes`
    [H, n, block, bytes] and `value_codes` [H, n, value_head_dim, bytes] are packed (uint8).
    """

    key_bits: int
    value_bits: int
    key_by_channel: bool
    key_parameters: Tensor
    value_parameters: Tensor
    key_codes: Tensor
    value_codes: Tensor


def record_views(raw: Tensor, plan: LayerPlan, key_bits: int, value_bits: int) -> Records:
    """The fields of n records of all heads, `raw` [H, n, bytes] (uint8), whose codes have these widths."""
    fields = plan.record.fields
    parts = raw.split([field.bits(key_bits, value_bits) // 8 for field in fields.values()], dim=-1)
    views = {
        name: part.view(torch.int16) if field.kind == "parameter" else part.unflatten(-1, (field.lines, -1))
        for (name, field), part in zip(fields.items(), parts, strict=True)
    }
    return Records(key_bits=key_bits, value_bits=value_bits, key_by_channel=plan.key_axis == "channel", **views)


def write_records(records: Records, keys: Tensor, values: Tensor) -> None:
    """Quantize n blocks, `keys` [H, n, block, key_head_dim] and `values` [H, n, block, value_head_dim]."""
    key_dim = -2 if records.key_by_channel else -1
    key_parameters, value_parameters = group_parameters(keys, key_dim), group_parameters(values, -1)
    records.key_parameters.copy_(key_parameters.squeeze(key_dim))
    records.value_parameters.copy_(value_parameters.squeeze(-1))
    key_codes = encode(keys, key_parameters, records.key_bits)
    value_codes = encode(values, value_parameters, records.value_bits).transpose(-1, -2)
    records.key_codes.copy_(pack(key_codes, records.key_bits).view(torch.uint8))
    records.value_codes.copy_(pack(value_codes, records.value_bits).view(torch.uint8))


@dataclass(frozen=True)
class Counts:
    """The counts of a layer: the rows and the flushed blocks of every sequence, and the stage of the layer."""

    rows: list[int]
    flushed: list[int]
    stage: int


class LayerCache:
    """The cache of one layer for `batch_size` sequences, each with its own length.

    Everyone may read `rows`, `flushed` and `stage`; only this class writes them. Kernels that store or lower codes
    report it through `grow`, `grow_to` and `lowering`; `seek` and `go_back` change the counts alone.
    """

    def __init__(
        self, plan: LayerPlan, batch_size: int, max_len: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.plan = plan = fitted(plan, max_len)
        self.ring = blocks_needed(plan, max_len)
        """The most blocks that are alive at once. A sliding-window layer reuses the slots of blocks that have left its
        window."""
        size = head_bytes(plan, max_len, batch_size, dtype.itemsize)
        self._look_into(
            torch.empty(batch_size, plan.num_key_value_heads, size, dtype=torch.uint8, device=device), dtype
        )
        self.stage = 0
        self.rows = [0] * batch_size
        self.flushed = [0] * batch_size
        self.overwritten = False
        """Whether the current change has written over rows of the window or over codes that were there before it."""

    def _look_into(self, arena: Tensor, dtype: torch.dtype) -> None:
        """Set the arena, and the views of it that everything else reads and writes."""
        plan, self.arena = self.plan, arena
        rows, numbers = plan.sink + plan.window, row_numbers(plan.key_head_dim, plan.value_head_dim)
        buffers = buffer_bytes(plan, dtype.itemsize)
        parts = arena[..., :buffers].view(dtype).split([rows * count for count in numbers.values()], dim=-1)
        views = {name: part.unflatten(-1, (rows, -1)) for name, part in zip(numbers, parts, strict=True)}
        self.keys, self.values = views["keys"], views["values"]
        self.pool = arena[..., buffers:]
        # the whole arena as words of parameters and codes, and as rows, which is how kernels address it
        self.words, self.buffers = arena.view(torch.int16), arena.view(dtype)
        self.head_units = arena.shape[-1] // ALIGNMENT

    def copy_on(self, device: torch.device) -> LayerCache:
        """The same layer with an arena of its own on a device."""
        twin = LayerCache.__new__(LayerCache)
        vars(twin).update(vars(self), rows=list(self.rows), flushed=list(self.flushed))
        twin._look_into(self.arena.to(device, copy=True), self.keys.dtype)
        return twin

    def __copy__(self) -> LayerCache:
        return self.copy_on(self.arena.device)

    def __deepcopy__(self, memo: dict[int, Any]) -> LayerCache:
        return self.copy_on(self.arena.device)

    def __getstate__(self) -> dict[str, Any]:
        """The arena is pickled as bytes: a tensor would be shared with the receiving process, and both would write to
        it. `__setstate__` makes the views anew."""
        arena, counted = io.BytesIO(), ("plan", "ring", "stage", "rows", "flushed", "overwritten")
        torch.save(self.arena.cpu(), arena)
        place = {"arena": arena.getvalue(), "dtype": self.keys.dtype, "device": str(self.arena.device)}
        return {**{name: getattr(self, name) for name in counted}, **place}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore the layer on its device, or on the CPU if this process does not have that device."""
        state = dict(state)
        arena, dtype, device = (state.pop(name) for name in ("arena", "dtype", "device"))
        vars(self).update(state)
        loaded = torch.load(io.BytesIO(arena), weights_only=True)
        self._look_into(loaded.to(device) if _is_there(device) else loaded, dtype)

    @property
    def counts(self) -> Counts:
        return Counts(list(self.rows), list(self.flushed), self.stage)

    def go_back(self, counts: Counts) -> None:
        """Return to earlier counts. The arena stays as it is."""
        self.rows, self.flushed, self.stage = list(counts.rows), list(counts.flushed), counts.stage

    def seek(self, lengths: Sequence[int], stage: int | None = None) -> None:
        """Set the counts for sequences that have had `lengths` tokens, at `stage`, or else at the first stage that
        holds them. The arena stays as it is; its content means nothing until it is filled."""
        self.flushed = [flushed_blocks(self.plan, length) for length in lengths]
        self.rows = [length - flushed * self.plan.block for length, flushed in zip(lengths, self.flushed, strict=True)]
        self.stage = self._stage_for(max(self.flushed), 0) if stage is None else stage

    def _stage_for(self, flushed: int, first: int) -> int:
        """The first stage, from `first` on, at which the pool holds the live ones among `flushed` blocks."""
        stage = first
        while min(flushed, self.ring) > self.capacity(stage):
            stage += 1
        return stage

    @property
    def bits(self) -> tuple[int, int]:
        """The present bits of K and V (those of the model's dtype in a layer that is never quantized)."""
        return self.plan.stages[self.stage] if self.plan.quantized else (self.plan.key_bits, self.plan.value_bits)

    @property
    def bytes_used(self) -> int:
        plan, row_bytes = self.plan, self.plan.key_head_dim * self.keys.itemsize
        row_bytes += self.plan.value_head_dim * self.values.itemsize
        blocks = sum(min(count, self.ring) for count in self.flushed)
        record = block_bytes(plan, *self.bits) if blocks else 0
        used: int = plan.num_key_value_heads * (sum(self.rows) * row_bytes + blocks * record)
        return used

    def capacity(self, stage: int | None = None) -> int:
        """Blocks of a sequence that the pool holds at a stage (by default the present one)."""
        if not self.ring:
            return 0
        widths = self.plan.stages[self.stage if stage is None else stage]
        return min(self.ring, self.pool.shape[-1] // block_bytes(self.plan, *widths))

    def live_blocks(self, sequence: int) -> int:
        return min(self.flushed[sequence], self.ring)

    def length(self, sequence: int) -> int:
        """Tokens that the sequence has had, those that a sliding window passed included."""
        return self.rows[sequence] + self.flushed[sequence] * self.plan.block

    def positions(self, sequence: int) -> Tensor:
        """Position of every stored token (int64): pool slots first, then sink and window rows."""
        plan, live, flushed = self.plan, self.live_blocks(sequence), self.flushed[sequence]
        device = self.arena.device
        slots = torch.arange(live, device=device)
        newest = flushed - 1 - (flushed - 1 - slots) % max(1, self.ring)
        starts = plan.sink + newest * plan.block
        pooled = starts.unsqueeze(-1) + torch.arange(plan.block, device=device)
        rows = torch.arange(self.rows[sequence], device=device)
        buffered = torch.where(rows < plan.sink, rows, rows + flushed * plan.block)
        return torch.cat([pooled.flatten(), buffered])

    def records(self, sequence: int, start: int, stop: int, bits: tuple[int, int] | None = None) -> Records:
        """The blocks in slots `start` to `stop`, whose codes have the present bits or the given ones."""
        plan, (key_bits, value_bits) = self.plan, bits or self.bits
        size = block_bytes(plan, key_bits, value_bits)
        raw = self.pool[sequence, :, start * size : stop * size].unflatten(-1, (stop - start, size))
        return record_views(raw, plan, key_bits, value_bits)

    def reached(self, sequence: int) -> int:
        """The smallest past length that explains how many blocks the sequence has flushed."""
        flushed, plan = self.flushed[sequence], self.plan
        return plan.sink + plan.window + (flushed - 1) * plan.block + 1 if flushed else 0

    def stages_until_fit(self, counts: Sequence[int]) -> range:
        """The stages that the layer must go through before `counts` new tokens of the sequences fit."""
        blocks = max(self._flushed_after(sequence, count) for sequence, count in enumerate(counts))
        return range(self.stage + 1, self._stage_for(blocks, self.stage) + 1)

    @property
    def longest_at_stage(self) -> int | None:
        """How many tokens a sequence may have before the layer must be lowered; None if it never must."""
        capacity, plan = self.capacity(), self.plan
        return None if capacity == self.ring else plan.sink + plan.window + capacity * plan.block

    def grow(self, counts: Sequence[int]) -> int:
        """Count new tokens that kernels put into the arena; returns the most blocks that a sequence flushes for
        them."""
        before = list(self.flushed)
        self.grow_to([self.length(sequence) + count for sequence, count in enumerate(counts)])
        return max(after - flushed for after, flushed in zip(self.flushed, before, strict=True))

    def grow_to(self, lengths: Sequence[int]) -> None:
        """Count tokens that kernels put into the arena, so that the sequences have `lengths`. A second call with the
        same lengths changes nothing."""
        for sequence, length in enumerate(lengths):
            flushed = max(self.flushed[sequence], flushed_blocks(self.plan, length))
            self.overwritten |= flushed > self.flushed[sequence]
            self.flushed[sequence], self.rows[sequence] = flushed, length - flushed * self.plan.block

    def _flushed_after(self, sequence: int, count: int) -> int:
        return max(self.flushed[sequence], flushed_blocks(self.plan, self.length(sequence) + count))

    def append(self, sequence: int, keys: Tensor, values: Tensor) -> None:
        """Add tokens (`keys` [H, S, key_head_dim], `values` [H, S, value_head_dim]) to one sequence.

        A token that meets a full window first sends the window's oldest block to the pool.
        """
        plan, row = self.plan, self.rows[sequence]
        fits = min(keys.shape[1], plan.sink + plan.window - row)
        self.keys[sequence, :, row : row + fits] = keys[:, :fits]
        self.values[sequence, :, row : row + fits] = values[:, :fits]
        self.rows[sequence] += fits
        if fits < keys.shape[1]:
            self._flush(sequence, keys[:, fits:], values[:, fits:])

    def _flush(self, sequence: int, keys: Tensor, values: Tensor) -> None:
        """Append tokens to a full window: its oldest blocks, and if need be the oldest of the new, go to the pool."""
        plan, sink = self.plan, self.plan.sink
        self.overwritten = True
        keys = torch.cat([self.keys[sequence, :, sink:], keys.to(self.keys.dtype)], dim=1)
        values = torch.cat([self.values[sequence, :, sink:], values.to(self.values.dtype)], dim=1)
        blocks = -(-(keys.shape[1] - plan.window) // plan.block)
        leaving = blocks * plan.block
        if self.ring:
            self._store(
                sequence,
                keys[:, :leaving].unflatten(1, (blocks, plan.block)),
                values[:, :leaving].unflatten(1, (blocks, plan.block)),
            )
        self.flushed[sequence] += blocks
        rows = sink + keys.shape[1] - leaving
        self.keys[sequence, :, sink:rows] = keys[:, leaving:]
        self.values[sequence, :, sink:rows] = values[:, leaving:]
        self.rows[sequence] = rows

    def _store(self, sequence: int, keys: Tensor, values: Tensor) -> None:
        """Quantize blocks (`keys` [H, n, block, key_head_dim]) into the next slots, lowering the layer until they
        fit."""
        first, last = self.flushed[sequence], self.flushed[sequence] + keys.shape[1]
        while min(last, self.ring) > self.capacity():
            self.lower()
        block = max(first, last - self.ring)
        while block < last:
            slot = block % self.ring
            run = min(last - block, self.ring - slot)
            chosen = slice(block - first, block - first + run)
            write_records(self.records(sequence, slot, slot + run), keys[:, chosen], values[:, chosen])
            block += run

    def reset(self) -> None:
        """Forget all tokens and start again at the widest codes."""
        self.seek([0] * len(self.rows))

    def reorder(self, sequences: Sequence[int]) -> None:
        """Let every sequence i hold what `sequences[i]` held, packed codes and all."""
        moved = [sequence for sequence, source in enumerate(sequences) if sequence != source]
        if moved:
            self.overwritten = True
            pooled = max(map(self.live_blocks, range(len(self.rows)))) * block_bytes(self.plan, *self.bits)
            used = slice(0, self.arena.shape[-1] - self.pool.shape[-1] + pooled)
            self.arena[moved, :, used] = self.arena[[sequences[sequence] for sequence in moved], :, used]
        self.rows = [self.rows[source] for source in sequences]
        self.flushed = [self.flushed[source] for source in sequences]

    def take(self, source: LayerCache, sequences: Sequence[int]) -> None:
        """Copy `sequences` of `source`, a layer of the same plan and `max_len`.

        More sequences have less room each, so the codes are lowered where they do not fit.
        """
        self.rows = [source.rows[sequence] for sequence in sequences]
        self.flushed = [source.flushed[sequence] for sequence in sequences]
        self.stage = self._stage_for(max(self.flushed), source.stage)
        for own, sequence in enumerate(sequences):
            rows, live = self.rows[own], self.live_blocks(own)
            self.keys[own, :, :rows] = source.keys[sequence, :, :rows]
            self.values[own, :, :rows] = source.values[sequence, :, :rows]
            for start in range(0, live, BLOCKS_LOWERED_AT_ONCE):
                stop = min(live, start + BLOCKS_LOWERED_AT_ONCE)
                _lower_records(source.records(sequence, start, stop), self.records(own, start, stop))

    def croppable(self, sequence: int) -> int:
        """How many of a sequence's last tokens can be taken back: those that are not quantized yet.

        Where a sliding window has dropped blocks, enough tokens must stay that no dropped block comes into view again.
        """
        flushed, plan = self.flushed[sequence], self.plan
        if not flushed:
            return self.rows[sequence]
        kept = plan.window - plan.block + 1 if flushed > self.ring else 0
        return max(0, self.rows[sequence] - plan.sink - kept)

    def crop(self, count: int) -> None:
        """Take back the last `count` tokens of every sequence; no more than are `croppable`."""
        self.rows = [rows - count for rows in self.rows]

    @contextmanager
    def lowering(self) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
        """For a `with` statement around code that rewrites the records. It gives the present bits of K and V and those
        of the next stage, at which the layer is when the statement ends."""
        self.overwritten = True
        yield self.plan.stages[self.stage], self.plan.stages[self.stage + 1]
        self.stage += 1

    def lower(self) -> None:
        """Lower the codes of all sequences to the next stage, in place."""
        with self.lowering() as (before, after):
            for sequence in range(len(self.rows)):
                live = self.live_blocks(sequence)
                for start in range(0, live, BLOCKS_LOWERED_AT_ONCE):
                    slots = sequence, start, min(live, start + BLOCKS_LOWERED_AT_ONCE)
                    _lower_records(self.records(*slots, before), self.records(*slots, after))


def _lower_records(wide: Records, narrow: Records) -> None:
    """Rewrite records at narrower widths. They may overlap: everything is read before anything is written."""
    key_parameters, value_parameters = wide.key_parameters.clone(), wide.value_parameters.clone()
    key_codes = _lower_codes(wide.key_codes, wide.key_bits, narrow.key_bits)
    value_codes = _lower_codes(wide.value_codes, wide.value_bits, narrow.value_bits)
    narrow.key_parameters.copy_(key_parameters)
    narrow.value_parameters.copy_(value_parameters)
    narrow.key_codes.copy_(key_codes)
    narrow.value_codes.copy_(value_codes)


def _lower_codes(packed: Tensor, bits: int, target: int) -> Tensor:
    if bits == target:
        return packed.clone()
    codes = unpack(packed.view(torch.int16), bits)
    return pack(lower(codes, bits, target), target).view(torch.uint8)


def _is_there(device: str) -> bool:
    try:
        torch.empty(0, device=device)
    except (AssertionError, RuntimeError):  # what torch raises for a device that it was not built for
        return False
    return True
