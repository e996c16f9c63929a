"""The progressive cache: one arena a layer, allocated once, whose codes are lowered in place when it is full.

An arena holds, for each sequence and head, the rows of sink and window and a pool of quantized blocks; `records` says
where what lies. Sink and window lie together so that one product serves both. Lowering a layer rewrites its records,
shorter, from the front of the pool; what that frees at the end takes new blocks.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import wraps
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

from .claims import Claims, Use
from .errors import CacheFull, InputError
from .inputs import whole_number, whole_numbers
from .plan import (
    ALIGNMENT,
    CachePlan,
    LayerPlan,
    block_bytes,
    blocks_needed,
    buffer_bytes,
    fitted,
    flushed_blocks,
    head_bytes,
    longest,
)
from .quantize import encode, group_parameters, lower, pack, unpack
from .records import STATE, row_numbers, state_row, state_rows

if TYPE_CHECKING:
    from .graph import DecodeGraph
    from .kernels import LayerKernels

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


class LayerCache:
    """The cache of one layer for `batch_size` sequences, each with its own length."""

    def __init__(
        self, plan: LayerPlan, batch_size: int, max_len: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.plan = plan = fitted(plan, max_len)
        self.ring = blocks_needed(plan, max_len)
        """Blocks that are ever alive at once; a sliding-window layer reuses the slots of passed ones."""
        size = head_bytes(plan, max_len, batch_size, dtype.itemsize)
        self._look_into(
            torch.empty(batch_size, plan.num_key_value_heads, size, dtype=torch.uint8, device=device), dtype
        )
        self.stage = 0
        self.rows = [0] * batch_size
        self.flushed = [0] * batch_size
        self.overwritten = False
        """Whether a change that is under way wrote over what was there before it: rows of the window, codes."""

    def _look_into(self, arena: Tensor, dtype: torch.dtype) -> None:
        """Hold an arena, and the views of it that everything else reads and writes."""
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
        """The arena goes as bytes: a tensor would be shared with the process that it is sent to, and written by both.
        Views are made anew."""
        arena, counted = io.BytesIO(), ("plan", "ring", "stage", "rows", "flushed", "overwritten")
        torch.save(self.arena.cpu(), arena)
        place = {"arena": arena.getvalue(), "dtype": self.keys.dtype, "device": str(self.arena.device)}
        return {**{name: getattr(self, name) for name in counted}, **place}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """On the device that it was on, or on the CPU where that is not there."""
        state = dict(state)
        arena, dtype, device = (state.pop(name) for name in ("arena", "dtype", "device"))
        vars(self).update(state)
        loaded = torch.load(io.BytesIO(arena), weights_only=True)
        self._look_into(loaded.to(device) if _is_there(device) else loaded, dtype)

    @property
    def bits(self) -> tuple[int, int]:
        """Present widths of K and V codes (of the model's dtype in a layer that is never quantized)."""
        return self.plan.stages[self.stage] if self.plan.quantized else (self.plan.key_bits, self.plan.value_bits)

    @property
    def bytes_used(self) -> int:
        plan, row_bytes = self.plan, self.plan.key_head_dim * self.keys.itemsize
        row_bytes += self.plan.value_head_dim * self.values.itemsize
        blocks = sum(min(count, self.ring) for count in self.flushed)
        record = block_bytes(plan, *self.bits) if blocks else 0
        return plan.num_key_value_heads * (sum(self.rows) * row_bytes + blocks * record)

    def capacity(self, stage: int | None = None) -> int:
        """Blocks of a sequence that the pool holds at a stage (the present one unless told)."""
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
        """The blocks in slots `start` to `stop` at the present widths, or as they lie at `bits`."""
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
        last = self.stage
        while min(blocks, self.ring) > self.capacity(last):
            last += 1
        return range(self.stage + 1, last + 1)

    @property
    def longest_at_stage(self) -> int | None:
        """Tokens that a sequence may have before the layer must be lowered; None where it never must."""
        capacity, plan = self.capacity(), self.plan
        return None if capacity == self.ring else plan.sink + plan.window + capacity * plan.block

    def grow(self, counts: Sequence[int]) -> int:
        """Count new tokens that kernels put into the arena; returns the most blocks that a sequence has flushed."""
        before = list(self.flushed)
        self.grow_to([self.length(sequence) + count for sequence, count in enumerate(counts)])
        return max(after - flushed for after, flushed in zip(self.flushed, before, strict=True))

    def grow_to(self, lengths: Sequence[int]) -> None:
        """Count tokens that kernels put into the arena, up to `lengths` of the sequences. It may be done twice."""
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
        self.stage = 0
        self.rows = [0] * len(self.rows)
        self.flushed = [0] * len(self.rows)

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
        """Hold what `sequences` of `source` hold, a layer of the same plan and `max_len`, lowered where it must be.

        A cache of more sequences has less room for each.
        """
        self.rows = [source.rows[sequence] for sequence in sequences]
        self.flushed = [source.flushed[sequence] for sequence in sequences]
        self.stage = source.stage
        while max(map(self.live_blocks, range(len(self.rows)))) > self.capacity():
            self.stage += 1
        for own, sequence in enumerate(sequences):
            rows, live = self.rows[own], self.live_blocks(own)
            self.keys[own, :, :rows] = source.keys[sequence, :, :rows]
            self.values[own, :, :rows] = source.values[sequence, :, :rows]
            for start in range(0, live, BLOCKS_LOWERED_AT_ONCE):
                stop = min(live, start + BLOCKS_LOWERED_AT_ONCE)
                _lower_records(source.records(sequence, start, stop), self.records(own, start, stop))

    def croppable(self, sequence: int) -> int:
        """The last tokens of a sequence that can be taken back: those that were not quantized.

        Where a sliding window has let blocks go, what the remaining tokens see must not be among them.
        """
        flushed, plan = self.flushed[sequence], self.plan
        if not flushed:
            return self.rows[sequence]
        kept = plan.window - plan.block + 1 if flushed > self.ring else 0
        return max(0, self.rows[sequence] - plan.sink - kept)

    def lower(self) -> None:
        """Lower the codes of all sequences to the next stage, in place."""
        self.overwritten = True

        before, after = self.plan.stages[self.stage], self.plan.stages[self.stage + 1]
        for sequence in range(len(self.rows)):
            live = self.live_blocks(sequence)
            for start in range(0, live, BLOCKS_LOWERED_AT_ONCE):
                stop = min(live, start + BLOCKS_LOWERED_AT_ONCE)
                _lower_records(self.records(sequence, start, stop, before), self.records(sequence, start, stop, after))
        self.stage += 1


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


@dataclass(frozen=True)
class Change:
    """What a cache counted when a change began that has not ended: a call, a new order. It goes back to this where the
    change breaks off, which it does with its `use`, and has overwritten nothing."""

    use: Use | None
    length: list[int]
    ahead: bool
    layers: list[tuple[list[int], list[int], int]]
    """Rows, flushed blocks and stage."""

    @property
    def goes_on(self) -> bool:
        return self.use is not None and self.use.goes_on


Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")
Method = Callable[Concatenate["Cache", Arguments], Result]


def _claims(to_read: bool = False) -> Callable[[Method[Arguments, Result]], Method[Arguments, Result]]:
    """A method for which the cache is claimed as long as it runs."""

    def claiming(method: Method[Arguments, Result]) -> Method[Arguments, Result]:
        @wraps(method)
        def claimed(cache: Cache, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
            with cache.claims.claim(to_read):
                return method(cache, *args, **kwargs)

        return claimed

    return claiming


class Cache:
    """The key/value cache of a model: a `LayerCache` a layer and the length of every sequence.

    One thread uses it at a time; another one is refused, not kept waiting. A call that breaks off leaves the cache as
    it was, or, where it had overwritten something, a cache that refuses all but `reset`. What `copy`, `deepcopy` and
    `pickle` make has memory of its own.

    Raises `InputError` where `batch_size` sequences of `max_len` tokens do not fit the plan's bytes.
    """

    def __init__(
        self,
        plan: CachePlan,
        batch_size: int,
        max_len: int | None,
        dtype: torch.dtype,
        device: torch.device,
        kernels: Sequence[LayerKernels] | None = None,
    ) -> None:
        batch_size = whole_number("batch_size", batch_size)
        max_len = None if max_len is None else whole_number("max_len", max_len)
        largest = longest(plan, batch_size, dtype.itemsize)
        if batch_size < 1 or largest < 1:
            raise InputError(
                f"batch_size {batch_size} cannot be held: the plan's {plan.arena_bytes:,} bytes are for "
                f"{plan.batch_size} sequence(s) of {plan.max_len:,} tokens; "
                f"compile with a larger --budget or --batch-size"
            )
        tokens = largest if max_len is None else max_len
        if not 1 <= tokens <= largest:
            raise InputError(
                f"max_len {max_len} is not between 1 and {largest:,}, the tokens that {batch_size} sequence(s) may "
                f"have within this artifact's budget; compile with a larger --max-len or --budget"
            )
        layers = [LayerCache(layer, batch_size, tokens, dtype, device) for layer in plan.layers]
        self._hold(plan, tokens, layers, [0] * batch_size)
        self.attend_by(kernels)

    def _hold(self, plan: CachePlan, max_len: int, layers: list[LayerCache], length: list[int]) -> None:
        """Begin with these layers and what they hold; nobody uses the cache yet, and the reference path attends."""
        self.plan = plan
        self.max_len = max_len
        self.batch_size = len(length)
        self.layers = layers
        self._length = length
        self.columns: list[slice] = []
        """Columns of each sequence's own tokens in the call under way; the rest is padding."""
        self.ahead = False
        """Whether steps ran whose tokens only `state` has counted; `settle` counts them here, too."""
        self.graph: DecodeGraph | None = None
        """The captured decode step of the model that decoded last."""
        self.change: Change | None = None
        """The change that is under way, or broke off."""
        self.claims = Claims()
        """Who uses the cache."""
        self.attend_by(None)

    def attend_by(self, kernels: Sequence[LayerKernels] | None) -> None:
        """Let these kernels attend, a set of them a layer; the reference path where there are none."""
        self.kernels = kernels
        self.state = None
        """For the kernels: what `records.STATE` says of each sequence."""
        if kernels is not None:
            self.state = torch.zeros(len(STATE), self.batch_size, dtype=torch.int32, device=self.device)

    @property
    def device(self) -> torch.device:
        return self.layers[0].arena.device

    @property
    def length(self) -> list[int]:
        """Tokens that each sequence has had."""
        self.settle()
        return self._length

    @length.setter
    def length(self, tokens: list[int]) -> None:
        self._length = tokens

    # ---- who uses the cache, and changes that end or do not ----

    def begin_change(self) -> None:
        """Note what to go back to. Raises `InputError` where the change before broke off and cannot be taken back."""
        self._ready()
        self.note_change()

    def note_change(self) -> None:
        """`begin_change` where no change broke off; what the device has counted alone stays so."""
        for layer in self.layers:
            layer.overwritten = False
        self.change = Change(
            self.claims.current(),
            self._length,
            self.ahead,
            [(list(layer.rows), list(layer.flushed), layer.stage) for layer in self.layers],
        )

    def end_change(self) -> None:
        """From here on the change is made; before, it is not."""
        self.change = None

    def _ready(self) -> None:
        """Take back a change that broke off."""
        change = self.change
        if change is None:
            self.settle()
            return
        if change.goes_on:
            raise InputError("this cache is in the middle of a call; use it again when that has ended")
        change = self.change = replace(change, use=None)  # whose frame would keep a call's tensors alive
        if change.ahead or any(layer.overwritten for layer in self.layers):
            raise InputError(
                "this cache was interrupted in the middle of a call and holds half of it; reset() it or make a new one"
            )
        for layer, (rows, flushed, stage) in zip(self.layers, change.layers, strict=True):
            layer.rows, layer.flushed, layer.stage = rows, flushed, stage
        self._length = change.length
        self.ahead = False
        self.change = None

    @_claims(to_read=True)
    def settle(self) -> None:
        """Count the tokens of steps that ran on the device alone, as if each had been a call.

        The cache does it by itself before anything that needs it; `rows` and `flushed` of its layers are right after
        it.
        """
        if not self.ahead or self.change is not None:
            return
        assert self.state is not None
        lengths = (self.state[state_row("length")] + self.state[state_row("count")]).tolist()
        for layer in self.layers:
            layer.grow_to(lengths)
        self._length = lengths
        self.ahead = False

    @property
    def bits(self) -> list[tuple[int, int]]:
        """Present (K, V) widths of every layer."""
        return [layer.bits for layer in self.layers]

    @property
    def bytes_reserved(self) -> int:
        """Bytes of all tensors that the cache owns: constant from its first token to its last."""
        return sum(layer.arena.nbytes for layer in self.layers)

    @property
    def bytes_used(self) -> int:
        """Bytes of `bytes_reserved` that hold tokens now."""
        self.settle()
        return sum(layer.bytes_used for layer in self.layers)

    def check_room(self, counts: Sequence[int]) -> None:
        """Raises `CacheFull` where so many more tokens of each sequence do not fit."""
        for sequence, (length, new) in enumerate(zip(self.length, counts, strict=True)):
            if length + new > self.max_len:
                raise CacheFull(
                    f"sequence {sequence} has {length:,} of {self.max_len:,} tokens and {new:,} more do not fit; "
                    f"make a cache with a larger max_len or compile with a larger --max-len"
                )

    def begin(self, columns: list[slice]) -> None:
        """Announce a call's tokens. Raises `CacheFull` where they do not fit, before anything is changed."""
        self._ready()
        self.check_room([own.stop - own.start for own in columns])
        self.begin_change()
        self.columns = columns
        if self.state is not None:
            starts, counts = [own.start for own in columns], [own.stop - own.start for own in columns]
            reached = [
                max(length, *(layer.reached(sequence) for layer in self.layers))
                for sequence, length in enumerate(self._length)
            ]
            rows = state_rows({"length": self._length, "start": starts, "count": counts, "reached": reached})
            self.state.copy_(torch.tensor(rows, dtype=torch.int32))

    def steps_until_lowering(self, counts: Sequence[int]) -> int:
        """How often so many tokens (0 or 1 of a sequence) fit before a layer must be lowered or the cache is full."""
        limits = [limit for layer in self.layers if (limit := layer.longest_at_stage) is not None]
        longest = max((length for length, count in zip(self.length, counts, strict=True) if count), default=0)
        return min([self.max_len, *limits]) - longest

    def end(self) -> None:
        """Count the tokens of the call that `begin` announced."""
        if self.change is None:
            raise InputError("this cache was used while a call was under way, which is lost; reset() it")
        self._length = [length + own.stop - own.start for length, own in zip(self._length, self.columns, strict=True)]
        self.end_change()

    @_claims()
    def reset(self) -> None:
        """Forget all tokens and start again at the widest codes, in the same memory."""
        if self.change is None:
            self.note_change()
        elif self.change.goes_on:
            self._ready()  # which refuses
        for layer in self.layers:
            layer.reset()
        self._length = [0] * self.batch_size
        self.ahead = False
        self.end_change()

    @_claims()
    @torch.inference_mode()
    def reorder(self, sequences: Sequence[int]) -> None:
        """Let every sequence i hold what sequence `sequences[i]` held, as beam search asks for.

        Packed codes are copied as they are, one layer at a time. Raises `InputError` for other sequences than the
        cache's; nothing is changed then.
        """
        order = self._checked(sequences)
        if len(order) != self.batch_size:
            raise InputError(
                f"{len(order)} sequences cannot take the places of {self.batch_size}; "
                f"for another number of them make a new cache with select"
            )
        self.begin_change()
        for layer in self.layers:
            layer.reorder(order)
        self._length = [self._length[sequence] for sequence in order]
        self.end_change()

    @_claims(to_read=True)
    def select(self, sequences: Sequence[int]) -> Cache:
        """A new cache of these sequences, in any number and order, within the same budget.

        More sequences have less room each, so that layers may be lowered; this cache stays as it is. Raises
        `InputError` where so many sequences of `max_len` tokens do not fit the budget.
        """
        order = self._checked(sequences)
        self._ready()
        chosen = Cache(self.plan, len(order), self.max_len, self.layers[0].keys.dtype, self.device, self.kernels)
        for layer, source in zip(chosen.layers, self.layers, strict=True):
            layer.take(source, order)
        chosen.length = [self._length[sequence] for sequence in order]
        return chosen

    @_claims()
    def crop(self, count: int) -> None:
        """Take back the last `count` tokens of every sequence.

        Only tokens that were not quantized yet can be taken back; earlier ones that they pushed out of the window stay
        quantized. Raises `InputError` for more than that; nothing is changed then.
        """
        count = whole_number("count", count)
        self._ready()
        limit = min(layer.croppable(sequence) for layer in self.layers for sequence in range(self.batch_size))
        if not 0 <= count <= limit:
            raise InputError(
                f"{count:,} tokens cannot be taken back from this cache: its last {limit:,} are not quantized yet; "
                f"feed the tokens that you keep to a new cache"
            )
        self.begin_change()
        for layer in self.layers:
            layer.rows = [rows - count for rows in layer.rows]
        self._length = [length - count for length in self._length]
        self.end_change()

    # ---- copies: the plan, the arenas' bytes and what is counted; each has memory of its own ----

    @_claims(to_read=True)
    def to(self, device: str | torch.device) -> Cache:
        """A copy on another device, for a model there; this cache where it is on that device.

        Raises `InputError` for what is no device: a cache keeps its dtype.
        """
        try:
            place = torch.empty(0, device=device).device
        except (AssertionError, RuntimeError, TypeError) as error:
            raise InputError(
                f"a cache cannot be moved to {device!r} ({str(error).splitlines()[0]}); name a device that PyTorch has"
            ) from error
        return self if place == self.device else self._copy_on(place)

    def cpu(self) -> Cache:
        """`to("cpu")`."""
        return self.to("cpu")

    def cuda(self) -> Cache:
        """`to("cuda")`."""
        return self.to("cuda")

    def share_memory_(self) -> None:
        """Raises `InputError`: processes could share a cache's memory, but not what it counts."""
        raise InputError(
            "a cache cannot be shared between processes; send it to one, which pickles it, and go on there"
        )

    @_claims(to_read=True)
    def __copy__(self) -> Cache:
        return self._copy_on(self.device)

    def __deepcopy__(self, memo: dict[int, Any]) -> Cache:
        return self.__copy__()

    def _copy_on(self, device: torch.device) -> Cache:
        self._ready()
        twin = Cache.__new__(Cache)
        twin._hold(self.plan, self.max_len, [layer.copy_on(device) for layer in self.layers], list(self._length))
        twin.attend_by(self.kernels if device == self.device else None)
        return twin

    @_claims(to_read=True)
    def __getstate__(self) -> dict[str, Any]:
        """Without kernels, which the model gives that uses the cache next."""
        self._ready()
        return {"plan": self.plan, "max_len": self.max_len, "layers": self.layers, "length": self._length}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._hold(**state)

    def _checked(self, sequences: Sequence[int]) -> list[int]:
        """`sequences` as a list of ints that are all among the cache's."""
        listed = whole_numbers("sequences", sequences)
        if not listed or not all(0 <= sequence < self.batch_size for sequence in listed):
            raise InputError(f"sequences {listed} are not all among the cache's 0 to {self.batch_size - 1}")
        return listed
