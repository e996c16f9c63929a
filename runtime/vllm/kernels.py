"""Attention over pages through an artifact's generated Triton kernels: what `pages` computes in plain PyTorch.

Nothing here waits for the device: how long sequences are and where their blocks lie is read there, so that a captured
graph can be replayed as they grow. The host knows bounds, and which sequences may bring more than one token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..kernels import LayerKernels, merge_launch, overlap, places_of, splits_of
from ..prefill import (
    ROWS_COPIED,
    UNPACK_WARPS,
    Found,
    given,
    halved,
    known_to_the_library,
    over_pieces,
    pieces_of,
    scratch_for,
    scratch_holds,
)
from ..tuning import widths_of
from .layout import PagedLayer, tiers_to
from .pages import Batch
from .tiered import order_of

TOKENS_TURNED = 16
"""Tokens whose queries or keys a program rotates at once: rows of a matrix operand."""

TOKENS_KEPT = 64
"""New tokens that a program writes to where they are kept as they are."""


@dataclass(frozen=True)
class KernelPages:
    """The pages and rows of one layer, and its kernels.

    `pages` and `rows` [N, block_bytes] (uint8) are the pool seen as blocks of pages and of rows, in which the layer
    begins at these bytes; a block of rows has `row_block` tokens. An exact layer has no rows. Sequences have up to
    `max_len` tokens. `rotation` [H, key_head_dim, key_head_dim] (float32) turns keys and queries first. `ties`
    name the further blocks of pages, see `pages`.
    """

    layer: PagedLayer
    kernels: LayerKernels
    dtype: torch.dtype
    max_len: int
    pages: Tensor
    page_offset: int
    rows: Tensor | None = None
    row_offset: int = 0
    row_block: int = 0
    rotation: Tensor | None = None
    ties: Tensor | None = None

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
        """`Attends.attend_batch`; the soft cap is a constant of the kernels."""
        channels = queries.shape[-1]
        packed = queries.stride(-1) == 1 and queries.stride(1) == channels
        queries = queries if packed else queries.contiguous()
        keys, values = (part if part.stride(-1) == 1 else part.contiguous() for part in (keys, values))
        if self.rotation is not None:
            queries, keys = self._rotated(queries, keys, self.rotation)
        self._append(keys, values, batch)
        if batch.single:
            self._decode(queries, batch, scale, sinks, out)
        if batch.longest_new > 1:
            self._prefill(queries, keys, values, batch, scale, sinks, out)

    def _rotated(self, queries: Tensor, keys: Tensor, rotation: Tensor) -> tuple[Tensor, Tensor]:
        """`rotate_heads` of both in one launch."""
        tokens, heads = keys.shape[:2]
        turned = queries.new_empty(queries.shape), keys.new_empty(keys.shape)
        self.kernels.module.rotate[(-(-tokens // TOKENS_TURNED), heads, queries.shape[1] // heads + 1)](
            queries,
            keys,
            rotation,
            *turned,
            queries.stride(0),
            keys.stride()[:2],
            tokens,
            heads,
            TILE=TOKENS_TURNED,
            num_warps=4,
        )
        return turned

    def _append(self, keys: Tensor, values: Tensor, batch: Batch) -> None:
        """Keep the new tokens, and quantize the blocks that they complete."""
        block = self.layer.plan.block
        pieces = -(-batch.longest_new // TOKENS_KEPT)
        if batch.longest_new == 1 and self.layer.plan.sink % block != 1:
            # One launch may keep a token and quantize the block that it completes, because the block's other tokens are
            # kept already. They are not if another sequence keeps them in this very step. But what is taken over from
            # another sequence ends with a page, so the first token behind it completes a block only where the sink is
            # one token longer than its pages.
            modes = [("token", 1, 1)]
        elif self.layer.exact:
            modes = [("rows", pieces, TOKENS_KEPT)]
        else:
            modes = [("rows", pieces, TOKENS_KEPT), ("blocks", batch.longest_new // block + 1, 1)]
        for mode, grid, chunk in modes:
            self.kernels.module.append_pages[(batch.count * self.layer.heads, 2, grid)](
                *self._pool(),
                keys,
                values,
                keys.stride()[:2],
                values.stride()[:2],
                *_sequences(batch),
                *self._place(),
                self.layer.heads,
                **self._constants(),
                **self._ties(),
                MODE=mode,
                CHUNK=chunk,
                num_warps=self.kernels.tuning.append_warps_for(self.layer.widths(1)),
                enable_fp_fusion=False,  # codes are those of the reference, to the last bit
            )

    def _decode(self, queries: Tensor, batch: Batch, scale: float, sinks: Tensor | None, out: Tensor) -> None:
        plan, heads = self.layer.plan, self.layer.heads
        launch = self._decode_launch()
        query_heads = queries.shape[1]
        page_splits, splits = self._splits(batch.count, launch["maxnreg"])
        parts = (batch.count * heads, splits, query_heads // heads)
        partial = torch.empty(*parts, plan.value_head_dim, dtype=torch.float32, device=queries.device)
        log_weights = torch.empty(parts, dtype=torch.float32, device=queries.device)
        self.kernels.module.decode_pages[parts[:2]](
            queries,
            *self._pool(),
            partial,
            log_weights,
            queries.stride(0),
            *_sequences(batch),
            *self._place(),
            self.layer.window,
            heads,
            page_splits,
            splits,
            scale,
            **self._constants(),
            **self._order(batch),
            **launch,
        )
        self.kernels.module.merge_pages[(batch.count, query_heads, -(-plan.value_head_dim // 32))](
            partial,
            log_weights,
            queries if sinks is None else sinks,
            out,
            batch.starts,
            splits,
            **merge_launch(splits),
            **overlap(self.kernels.module, queries.device),
        )

    def _decode_launch(self) -> dict[str, Any]:
        """Constants and options that the decode kernel is launched with, with numbers for every tier."""
        bits = self._constants()["VALUE_BITS"]
        launches = [self.kernels.decode_launch(self.layer.plan, bits * tier) for tier in self._tiers()]
        each = {name: tuple(launch[name] for launch in launches) for name in ("CELLS", "PREFETCH")}
        return {**launches[0], **each, "maxnreg": max(launch["maxnreg"] for launch in launches)}

    def _tiers(self) -> list[int]:
        """The tiers of the layer's pages."""
        return tiers_to(1 if self.ties is None else self.layer.highest_tier)

    def _order(self, batch: Batch) -> dict[str, Any]:
        """In which order sequences of one new token read pages of several tiers. The first layer of a step finds it for
        all that see the same pages. A graph finds it again, though it was tried with the same batch before."""
        highest, plan = self._tiers()[-1], self.layer.plan
        if self.ties is None or highest == 1:
            return {}
        captured = self.ties.is_cuda and torch.cuda.is_current_stream_capturing()
        key = (self.layer.window, plan.sink, plan.sliding_window, highest, captured)
        if key not in batch.orders:
            batch.orders[key] = order_of(self.kernels, self.layer, self.ties, batch)
        order = batch.orders[key]
        return {"order": order, "order_width": order.stride(0), "HIGHEST": highest}

    def _splits(self, sequences: int, registers: int) -> tuple[int, int]:
        """In how many parts a head's records are read, and how many parts that makes with those of its rows.

        They are those of the longest sequences and of a power of two of them, so that a graph which was captured for
        more computes the same numbers, in the same order, as a step without one.
        """
        layer = self.layer
        heads = layer.heads * (1 << (sequences - 1).bit_length())
        places = places_of(self.pages.device, registers)
        if layer.exact:
            return 0, splits_of(heads, self._seen_at_most(1), 0, places)[0]
        return splits_of(heads, self._blocks(1), layer.plan.sink + layer.window, places)

    def _seen_at_most(self, new: int) -> int:
        """Tokens at most that some of `new` tokens of a sequence sees."""
        sliding = self.layer.plan.sliding_window
        return self.max_len if sliding is None else min(self.max_len, sliding + new - 1)

    def _blocks(self, new: int, longest: int | None = None) -> int:
        """Blocks at most that some of `new` tokens of a sequence of `longest` tokens sees as codes."""
        layer, plan = self.layer, self.layer.plan
        if layer.exact:
            return 0
        length = self.max_len if longest is None else longest
        blocks = (layer.quantized_until(length - 1) - plan.sink) // plan.block
        return min(blocks, -(-self._seen_at_most(new) // plan.block) + 1)

    def _prefill(
        self,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        batch: Batch,
        scale: float,
        sinks: Tensor | None,
        out: Tensor,
    ) -> None:
        """Attention of sequences that bring more than one token. Where the host knows a sequence, and the library has
        attention for the layer, it reads the blocks that all of the new tokens see as codes."""
        unit, rest = self.kernels.tuning.library_unit, ((keys, values), batch, scale, sinks, out)
        if not unit or batch.longest_new < unit or not batch.known or not self._is_known_to_the_library(queries):
            self._attend_rest(queries, batch.several, batch.longest_new, batch.longest, None, *rest)
            return
        for sequence, (start, stop, length) in zip(batch.several, batch.known, strict=True):
            new, found = stop - start, None
            if new >= unit:
                found = self._by_the_library(queries, keys, values, batch, sequence, scale)
            if new > 1:
                self._attend_rest(queries, range(sequence, sequence + 1), new, length, found, *rest)

    def _is_known_to_the_library(self, queries: Tensor) -> bool:
        layer = self.layer
        return not layer.exact and known_to_the_library(self.kernels.module, layer.plan, queries)

    def _by_the_library(
        self, queries: Tensor, keys: Tensor, values: Tensor, batch: Batch, sequence: int, scale: float
    ) -> Found | None:
        """The attention of a sequence's new tokens over its oldest blocks; None if these are too few."""
        plan, tuning = self.layer.plan, self.kernels.tuning
        start, stop, length = batch.known[sequence - batch.several.start]
        seen = (self.layer.quantized_until(length - (stop - start)) - plan.sink) // plan.block
        room = scratch_holds(self.kernels.module, tuning, self.layer.heads * plan.block, queries.dtype)
        pieces = pieces_of(seen, plan.block, tuning.library_unit, room)
        if not pieces:
            return None
        # [1, Hq, T, key_head_dim]
        by_heads = queries.transpose(0, 1).unsqueeze(0)
        (q,) = halved(self.kernels.module, (by_heads,), 0, slice(start, stop), tuning.library_unit)
        unpacked = self._unpacked(keys, values, batch, sequence, pieces)
        return Found(sum(pieces), over_pieces(self.kernels.module, q, unpacked, scale))

    def _unpacked(
        self, keys: Tensor, values: Tensor, batch: Batch, sequence: int, pieces: Sequence[int]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Keys and values [1, H, tokens, channels] of pieces of a sequence's records."""
        plan, heads, done = self.layer.plan, self.layer.heads, 0
        for blocks in pieces:
            capacity = plan.sink + blocks * plan.block
            scratch = scratch_for(self.kernels.module, heads, capacity, keys)
            self._unpack((keys, values), scratch, batch, (sequence * heads, capacity, 0, done), blocks, heads)
            k, v = (part[None, :, plan.sink :] for part in scratch)
            yield k[..., : plan.key_head_dim], v[..., : plan.value_head_dim]
            done += blocks

    def _attend_rest(
        self,
        queries: Tensor,
        sequences: range,
        longest_new: int,
        longest: int,
        found: Found | None,
        new: tuple[Tensor, Tensor],
        batch: Batch,
        scale: float,
        sinks: Tensor | None,
        out: Tensor,
    ) -> None:
        """Write the attention of these sequences, of at most so many tokens, to `out`: what they see is unpacked, for
        as many heads at once as the scratch holds; one head of one sequence may take more than that."""
        layer, tuning, module = self.layer, self.kernels.tuning, self.kernels.module
        skipped = 0 if found is None else found.blocks
        pieces, recent_at, capacity = self._room(longest_new, longest, skipped)
        first, last = sequences.start * layer.heads, sequences.stop * layer.heads
        at_once = min(last - first, max(1, scratch_holds(module, tuning, capacity, queries.dtype)))
        scratch = scratch_for(module, at_once, capacity, queries)
        tile, step = tuning.prefill_shape(max(part.shape[-1] for part in scratch), scratch[0].dtype)
        tiles, group = -(-longest_new // tile), queries.shape[1] // layer.heads
        for head in range(first, last, at_once):
            some = min(at_once, last - head)
            where = (head, capacity, recent_at, skipped)
            self._unpack(new, scratch, batch, where, pieces, some)
            parts, columns, count = given(found, (head - first) * group, scratch[0])
            module.prefill_pages[(tiles, group, some)](
                queries,
                *scratch,
                queries if sinks is None else sinks,
                out,
                batch.starts,
                batch.lengths,
                *parts,
                queries.stride(0),
                layer.window,
                layer.heads,
                *where,
                columns,
                count,
                scale,
                FOUND=found is not None,
                EXACT=layer.exact,
                TILE=tile,
                STEP=step,
                num_warps=tuning.prefill_warps,
                num_stages=tuning.prefill_stages,
            )

    def _unpack(
        self,
        new: tuple[Tensor, Tensor],
        scratch: tuple[Tensor, Tensor],
        batch: Batch,
        where: tuple[int, int, int, int],
        pieces: int,
        heads: int,
    ) -> None:
        """Unpack what so many heads see into `scratch`. `where` are the first of them, the tokens that it has room for,
        after how many those begin that are seen as they are, and the blocks to be skipped."""
        self.kernels.module.unpack_pages[(pieces, 2, heads)](
            *self._pool(),
            *new,
            *scratch,
            *(part.stride()[:2] for part in new),
            *_sequences(batch),
            *self._place(),
            self.layer.window,
            self.layer.heads,
            *where,
            **self._constants(),
            **self._ties(),
            ROWS=ROWS_COPIED,
            num_warps=UNPACK_WARPS,
        )

    def _room(self, new: int, longest: int, skipped: int) -> tuple[int, int, int]:
        """Of what `new` tokens of a sequence of `longest` tokens see at most behind the `skipped` blocks: in how many
        pieces it is unpacked, after how many tokens of the scratch those begin that are seen as they are, and how many
        tokens that makes."""
        layer, plan = self.layer, self.layer.plan
        blocks = self._blocks(new, longest) - skipped
        recent = min(longest, self._seen_at_most(new) if layer.exact else layer.window + new)
        sink = 0 if layer.exact else plan.sink
        recent_at = _rounded(sink + blocks * plan.block)
        return blocks + -(-(sink + recent) // ROWS_COPIED), recent_at, recent_at + _rounded(recent)

    def _pool(self) -> tuple[Tensor, Tensor]:
        """Pages as 16-bit words, and rows as numbers; those of an exact layer are in its pages."""
        rows = self.pages if self.rows is None else self.rows
        return self.pages.view(torch.int16), rows.view(self.dtype)

    def _place(self) -> tuple[int, int, int, int, int]:
        """Bytes of a block, where pages begin in it, those of a head, where rows begin, and their tokens in a block."""
        rows = (self.row_offset, self.row_block) if self.rows is not None else (self.page_offset, self.layer.plan.block)
        return self.pages.stride(0), self.page_offset, self.layer.record_bytes, *rows

    def _constants(self) -> dict[str, Any]:
        plan = self.layer.plan
        return {**widths_of(plan, (plan.key_bits, plan.value_bits)), "EXACT": self.layer.exact}

    def _ties(self) -> dict[str, Any]:
        if self.ties is None or self.layer.highest_tier == 1:
            return {}
        return {"ties": self.ties, "tie_width": self.ties.stride(0), "HIGHEST": self.layer.highest_tier}


def _sequences(batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor, int, int]:
    tables = (batch.page_table, batch.row_table)
    return batch.starts, batch.lengths, *tables, tables[0].stride(0), tables[1].stride(0)


def _rounded(tokens: int) -> int:
    return -(-tokens // ROWS_COPIED) * ROWS_COPIED
