"""The attention of a call's new tokens over keys and values that are unpacked for all of them, in bounded scratch.

Where the library has attention for a layer, it reads most of this: the new tokens, and whole pieces of the pool, which
all of them see. It returns the logarithms of its weights' sums, too, so the generated kernel goes on from there with
what remains of the pool, sink and window. The generated kernel does everything where the library cannot help.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from types import ModuleType

import torch
from torch import Tensor

from .backend import NewTokens
from .cubins import CompiledKernels
from .layer_cache import LayerCache
from .library import library_attention, library_has
from .plan import LayerPlan
from .streams import side_by_side
from .tuning import Tuning, widths_of

ROWS_COPIED = 64
"""Tokens outside the pool that a program of the unpacking kernel takes at once."""

UNPACK_WARPS = 8
"""Warps of a program of the unpacking kernel, which waits for memory: with more of them lanes hold fewer numbers."""

ROWS_JOINED = 32
"""Queries whose numbers a program converts, or puts together, at once."""


Part = tuple[Tensor, Tensor]
"""Attention over some tokens: means of values [Hq, columns, dv] (fp16), and the natural logarithms of the weights' sums
[Hq, columns] (fp32)."""


def nothing() -> None:
    """For the second stream, or for a layer to which nothing is added."""


@dataclass(frozen=True)
class Found:
    """What the library computed for a sequence, in one or two `parts` of what its queries attend to. Together they
    cover the oldest `blocks` of the pool, and in the single-process cache the new tokens that each query sees. The
    sequence's queries are the first of the parts' columns. Where it is `everything`, the library has read sink and
    window as well."""

    blocks: int
    parts: Sequence[Part]
    everything: bool = False


@dataclass(frozen=True)
class Prefill:
    """The attention of new tokens over a layer and their own `k` and `v`; channels of the three tensors are dense."""

    module: ModuleType | CompiledKernels
    tuning: Tuning
    q: Tensor
    k: Tensor
    v: Tensor
    store: LayerCache
    new: NewTokens
    scale: float
    sinks: Tensor | None

    def attend(self, append: Callable[[], None] = nothing) -> Tensor:
        """Attention [B, Hq, S, dv] in the dtype of `q`. `append` adds the new tokens to the layer; it is called when
        all that reads what is stored has been launched."""
        unit, counts = self.tuning.library_unit, self.new.counts
        if not unit or max(counts) < unit or not known_to_the_library(self.module, self.store.plan, self.q):
            out = self._result()
            self._attend_rest(range(len(counts)), None, out)
            append()
            return out
        found = self._by_the_library(0)
        out = self._result()  # only now, when the memory that the library needed in between is free again
        for sequence, count in enumerate(counts):
            if sequence:
                found = self._by_the_library(sequence)
            if count:
                finish, aside = partial(self._attend_rest, range(sequence, sequence + 1), found, out), nothing
                if found is not None and found.everything and sequence == len(counts) - 1:
                    aside, append = append, nothing  # few programs, which wait for each other
                side_by_side(self.q.device, finish, aside)
        append()
        return out

    def _result(self) -> Tensor:
        """Room for the result, whose padding columns are zeros."""
        make = torch.empty if self.new.fill(self.q.shape[2]) else torch.zeros
        return make(*self.q.shape[:3], self.v.shape[-1], dtype=self.q.dtype, device=self.q.device)

    # ---- most of it, by the library ----

    def _by_the_library(self, sequence: int) -> Found | None:
        """The attention of a sequence's new tokens over themselves, and over the oldest blocks of the pool or all that
        is stored; None if it brings too few."""
        own, plan, unit = self.new.columns[sequence], self.store.plan, self.tuning.library_unit
        if self.new.counts[sequence] < unit:
            return None
        q, k, v = halved(self.module, (self.q, self.k, self.v), sequence, own, unit)
        blocks, rows = self.store.live_blocks(sequence), self.store.rows[sequence]
        pieces, everything = history_of(blocks, rows, plan.block, unit, self._room_of_blocks)
        themselves = partial(library_attention, q, k, v, self.scale, causal=True)
        unpacked = self._unpacked(sequence, pieces, everything)
        return Found(sum(pieces), over_pieces(self.module, q, unpacked, self.scale, themselves), everything)

    @property
    def _room_of_blocks(self) -> int:
        """Blocks of all heads of a sequence that fit the scratch."""
        plan = self.store.plan
        return scratch_holds(self.module, self.tuning, plan.num_key_value_heads * plan.block, self.q.dtype)

    def _unpacked(self, sequence: int, pieces: Sequence[int], everything: bool) -> Iterator[tuple[Tensor, Tensor]]:
        """Keys and values [1, Hkv, tokens, channels] of pieces of a sequence's pool, the last of them, if they are to
        be `everything`, with sink and window."""
        plan, done = self.store.plan, 0
        heads = slice(sequence * plan.num_key_value_heads, (sequence + 1) * plan.num_key_value_heads)
        for number, blocks in enumerate(pieces, 1):
            rows = self.store.rows[sequence] if everything and number == len(pieces) else 0
            copies, pooled = -(-rows // ROWS_COPIED), blocks * plan.block
            capacity = pooled + (copies * ROWS_COPIED if rows else plan.sink)
            tokens = slice(0, pooled + rows) if rows else slice(plan.sink, capacity)
            keys, values = scratch_for(self.module, plan.num_key_value_heads, capacity, self.q)
            self._unpack(keys, values, heads, done, blocks + copies)
            yield keys[None, :, tokens, : plan.key_head_dim], values[None, :, tokens, : plan.value_head_dim]
            done += blocks

    # ---- the rest, by the generated kernel ----

    def _attend_rest(self, sequences: range, found: Found | None, out: Tensor) -> None:
        """Write the attention of these sequences into `out`. As many heads are unpacked at once as fit the scratch, but
        at least one, which may take more."""
        skipped, heads = 0 if found is None else found.blocks, self.store.plan.num_key_value_heads
        begin, end = sequences.start * heads, sequences.stop * heads
        if found is not None and found.everything:
            means = found.parts[0][0]
            self._attend_unpacked(means, means, found, out, slice(begin, end), 0)
            return
        pieces, capacity = self._room(sequences, found)
        at_once = min(end - begin, max(1, scratch_holds(self.module, self.tuning, capacity, self.q.dtype)))
        keys, values = scratch_for(self.module, at_once, capacity, self.q)
        for first in range(begin, end, at_once):
            some = slice(first, min(end, first + at_once))
            if pieces:
                self._unpack(keys, values, some, skipped, pieces)
            self._attend_unpacked(keys, values, found, out, some, (first - begin) * (self.q.shape[1] // heads))

    def _room(self, sequences: range, found: Found | None) -> tuple[int, int]:
        """For a head of the longest sequence, without what the library has read: how many programs unpack it, and the
        tokens that its room must hold."""
        store, pieces, tokens = self.store, 0, 0
        for sequence in sequences:
            blocks = store.live_blocks(sequence) - (0 if found is None else found.blocks)
            copied = store.rows[sequence] + (self.new.counts[sequence] if found is None else 0)
            pieces = max(pieces, blocks + -(-copied // ROWS_COPIED))
            tokens = max(tokens, blocks * store.plan.block + copied)
        return pieces, max(1, -(-tokens // ROWS_COPIED)) * ROWS_COPIED

    def _attend_unpacked(
        self, keys: Tensor, values: Tensor, found: Found | None, out: Tensor, heads: slice, first_query_head: int
    ) -> None:
        """Write into `out` the attention of these heads' queries over their unpacked `keys` and `values` and over what
        was `found` for them, from a query head on."""
        query_heads, columns = self.q.shape[1:3]
        plan, tuning = self.store.plan, self.tuning
        tile, step = tuning.prefill_shape(max(keys.shape[-1], values.shape[-1]), keys.dtype)
        warps, rest = tuning.prefill_warps, found is None or not found.everything
        if not rest:  # parts are only put together, for which small programs are best
            tile, warps = ROWS_JOINED, 4
        parts, found_columns, count = given(found, first_query_head, keys)
        grid = -(-columns // tile), query_heads // plan.num_key_value_heads, heads.stop - heads.start
        self.module.prefill[grid](
            self.q,
            keys,
            values,
            self.q if self.sinks is None else self.sinks,
            out,
            self.new.state,
            *parts,
            self.q.stride()[:3],
            columns,
            heads.start,
            self.q.shape[0],
            plan.window,
            self.store.ring,
            keys.shape[1],
            0 if found is None else found.blocks,
            found_columns,
            count,
            self.scale,
            FOUND=found is not None,
            REST=rest,
            TILE=tile,
            STEP=step,
            num_warps=warps,
            num_stages=tuning.prefill_stages,
        )

    # ---- both ----

    def _unpack(self, keys: Tensor, values: Tensor, heads: slice, skipped: int, pieces: int) -> None:
        """Write into `keys` and `values` [heads, capacity, channels] what these heads attend to behind the `skipped`
        blocks: so many pieces of pool, rows and new tokens."""
        self.module.unpack[(pieces, 2, heads.stop - heads.start)](
            self.store.words,
            self.store.buffers,
            self.k,
            self.v,
            keys,
            values,
            self.new.state,
            self.k.stride()[:3],
            self.v.stride()[:3],
            self.store.head_units,
            heads.start,
            self.k.shape[0],
            self.store.plan.window,
            self.store.ring,
            keys.shape[1],
            skipped,
            **widths_of(self.store.plan, self.store.bits),
            ROWS=ROWS_COPIED,
            num_warps=UNPACK_WARPS,
        )


def given(found: Found | None, first_query_head: int, absent: Tensor) -> tuple[tuple[Tensor, ...], int, int]:
    """What the generated kernel is given of what was found, from a query head on: two parts, which may be the same one,
    their columns, and how many parts there are. Where nothing was found, the tensor `absent` stands for each."""
    if found is None:
        return (absent,) * 4, 0, 0
    tensors = tuple(part[first_query_head:] for part in (*found.parts[0], *found.parts[-1]))
    return tensors, tensors[0].shape[1], len(found.parts)


def known_to_the_library(module: ModuleType | CompiledKernels, plan: LayerPlan, q: Tensor) -> bool:
    """Whether the library has the attention of a layer's queries `q`."""
    plain = plan.sliding_window is None and not module.SOFTCAP.value
    if not plain or unpacked_dtype(q.dtype) != torch.float16:
        return False
    return library_has(q.device, plan.key_head_dim, plan.value_head_dim)


def unpacked_dtype(dtype: torch.dtype) -> torch.dtype:
    """That of unpacked numbers, for queries in `dtype`."""
    return torch.float32 if dtype == torch.float32 else torch.float16


def scratch_holds(module: ModuleType | CompiledKernels, tuning: Tuning, tokens: int, dtype: torch.dtype) -> int:
    """How often so many tokens of a head, unpacked for queries in `dtype`, fit the scratch."""
    channels: int = module.KEY_PADDED.value + module.VALUE_PADDED.value
    return tuning.prefill_scratch // (tokens * channels * unpacked_dtype(dtype).itemsize)


def scratch_for(module: ModuleType | CompiledKernels, heads: int, tokens: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Room for so many tokens of heads, unpacked, for queries of the dtype and on the device of `like`."""
    key, value = (
        torch.empty(heads, tokens, padded.value, dtype=unpacked_dtype(like.dtype), device=like.device)
        for padded in (module.KEY_PADDED, module.VALUE_PADDED)
    )
    return key, value


def halved(
    module: ModuleType | CompiledKernels, parts: Sequence[Tensor], sequence: int, own: slice, unit: int
) -> list[Tensor]:
    """A sequence's own columns of queries, or of queries, keys and values, `parts` [B, heads, S, channels], as fp16
    [1, heads, columns, channels]: columns of zeros follow, up to a multiple of `unit`."""
    count, group = own.stop - own.start, module.GROUP.value
    columns = -(-count // unit) * unit
    halves = [part.new_empty(1, part.shape[1], columns, part.shape[3], dtype=torch.float16) for part in parts]
    read, written = ([*some, *[some[0]] * (3 - len(some))] for some in (parts, halves))
    module.halve[(columns // ROWS_JOINED, group + len(parts) - 1, parts[0].shape[1] // group)](
        *read,
        *written,
        *(part.stride()[:3] for part in read),
        sequence,
        own.start,
        count,
        columns,
        TILE=ROWS_JOINED,
        num_warps=4,
    )
    return halves


def pieces_of(blocks: int, block: int, unit: int, room: int) -> list[int]:
    """Pieces in which the library reads the first ones of so many blocks of `block` tokens; at most `room` at once.

    The library prepares a kernel for every length of a piece, which takes it as long as several layers' attention. So
    there are few lengths: the longest, and multiples of a 64th of it.
    """
    fine, most = piece_lengths(block, unit, room)
    whole, rest = divmod(blocks // fine * fine, most)
    return [most] * whole + [rest] * (rest > 0)


def piece_lengths(block: int, unit: int, room: int) -> tuple[int, int]:
    """What the blocks of a piece are a multiple of, and the most that they are."""
    longest, fine = (max(1, tokens // block) for tokens in (32 * unit, unit // 2))
    return fine, max(fine, min(longest, room) // fine * fine)


def history_of(blocks: int, rows: int, block: int, unit: int, room: int) -> tuple[list[int], bool]:
    """Pieces as of `pieces_of`, and whether the last of them is to have all `rows` of sink and window, too: where that
    makes no other lengths. Prompts that are fed in chunks from the beginning have such histories."""
    fine, most = piece_lengths(block, unit, room)
    whole, rest = divmod(blocks, most)
    tokens = rest * block + rows
    if tokens % (fine * block) or tokens > most * block:
        return pieces_of(blocks, block, unit, room), False
    return [most] * whole + [rest] * (tokens > 0), True


def over_pieces(
    module: ModuleType | CompiledKernels,
    q: Tensor,
    pieces: Iterable[tuple[Tensor, Tensor]],
    scale: float,
    themselves: Callable[[], Part] | None = None,
) -> list[Part]:
    """Attention of `q` [1, Hq, columns, dk] over keys and values [1, Hkv, T, channels] in pieces, all of which every
    query sees, and, where the library has that, too, over the new tokens `themselves`: in one or two parts, which the
    generated kernel puts together as it goes on from them. The first may be of a second stream, see `side_by_side`."""
    parts: list[Part] = []
    for k, v in pieces:
        if len(parts) == 2:
            module.join[(parts[0][1].numel() // ROWS_JOINED,)](*parts[0], *parts.pop(), TILE=ROWS_JOINED, num_warps=4)
        history = partial(library_attention, q, k, v, scale)
        if parts or themselves is None:
            parts.append(history())
        else:  # programs over history take long: those over new tokens fill the multiprocessors as the last of them end
            parts = [*reversed(side_by_side(q.device, history, themselves))]
    return parts if parts or themselves is None else [themselves()]
