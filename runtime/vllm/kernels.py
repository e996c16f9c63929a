"""The generated kernels over the pages of a pool: launched alike in every step, so that a step can be a CUDA graph.

Nothing here reads the device. How many sequences there are and how many tokens any of them brings at most are the
host's; how long each one is only the device's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..kernels import FEWEST_BLOCKS, MERGED_AT_ONCE, REGISTERS, ROWS_DECODED, multiprocessors
from ..records import STATE, state_row
from ..tuning import Tuning
from .layout import ENDLESS, PagedLayer

ENDLESS_WINDOW = min(ENDLESS, 1 << 30)
TOKENS_KEPT = 16
"""Tokens that a program writes as they are."""


@dataclass(frozen=True)
class Tables:
    """What the kernels are told of a step: `state` [len(STATE), most sequences] (int32), of which the first `count` are
    of this step, the tables [count, blocks] (int32) of their pages and rows, and how many new tokens any of them has
    at most."""

    state: Tensor
    pages: Tensor
    rows: Tensor
    count: int
    most_new: int


def tell(state: Tensor, starts: Tensor, lengths: Tensor) -> None:
    """Write into `state` where sequences begin in the batch, [n + 1], and how long they are with their new tokens,
    [n]."""
    counts = starts[1:] - starts[:-1]
    told = {"length": lengths - counts, "start": starts[:-1], "count": counts, "reached": lengths}
    for name in STATE:
        state[state_row(name), : len(counts)].copy_(told[name])


@dataclass(frozen=True)
class PagedKernels:
    """A layer's kernels, and where it lies in a pool: the same bytes seen as `words` (int16) and as `numbers` of the
    model's dtype, blocks `block_size` numbers apart. Offsets count numbers, too."""

    module: ModuleType
    tuning: Tuning
    layer: PagedLayer
    words: Tensor
    numbers: Tensor
    block_size: int
    page_at: int
    row_at: int
    row_block: int
    most_blocks: int
    """Blocks that a sequence of the longest length has."""

    @classmethod
    def of(
        cls,
        module: ModuleType,
        tuning: Tuning,
        layer: PagedLayer,
        pool: Tensor,
        dtype: torch.dtype,
        page_offset: int,
        row_offset: int,
        row_block: int,
        max_len: int,
    ) -> PagedKernels:
        """The kernels of a layer in `pool` [N, block_bytes] (uint8); offsets are bytes."""
        size = dtype.itemsize
        if layer.exact:  # pages are made of rows
            row_offset, row_block = page_offset, layer.plan.block
        return cls(
            module=module,
            tuning=tuning,
            layer=layer,
            words=pool.view(torch.int16),
            numbers=pool.view(dtype),
            block_size=pool.stride(0) // size,
            page_at=page_offset // size,
            row_at=row_offset // size,
            row_block=row_block,
            most_blocks=0 if layer.exact else -(-max_len // layer.plan.block),
        )

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, parts: Sequence[Tables], scale: float, sinks: Tensor | None, out: Tensor
    ) -> None:
        """Keep the new tokens of all parts of a step, then attend: `q` [T, Hq, key_head_dim], `k` and `v` [T, H, d] to
        `out` [T, Hq, value_head_dim].

        Sequences of one new token each come first in the batch, in the order of the tables. T may be more than the
        sequences have; what is padding gets anything.
        """
        q, k, v = (tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in (q, k, v))
        for tables in parts:
            self._keep(k, v, tables)
        for tables in parts:
            if tables.most_new == 1:
                self._decode(q[: tables.count], tables, scale, sinks, out)
            else:
                self._prefill(q, k, v, tables, scale, sinks, out)

    @property
    def _widths(self) -> dict[str, Any]:
        """Any that the kernels know where nothing is quantized."""
        plan = self.layer.plan
        exact = self.layer.exact
        return {"KEY_BITS": 8 if exact else plan.key_bits, "VALUE_BITS": 8 if exact else plan.value_bits}

    @property
    def _window(self) -> int:
        return ENDLESS_WINDOW if self.layer.exact else self.layer.window

    def _places(self, tables: Tables) -> tuple[Any, ...]:
        pages = tables.pages
        rows = pages if self.layer.exact else tables.rows
        head_page = self.layer.record_bytes // self.numbers.itemsize
        tail = (self.block_size, self.page_at, self.row_at, head_page, self.row_block)
        return (tables.state, tables.state.stride(0), pages, rows, pages.stride(0), rows.stride(0), *tail)

    def _keep(self, k: Tensor, v: Tensor, tables: Tables) -> None:
        new = (k, v, k.stride()[:2], v.stride()[:2])
        heads, places = self.layer.heads, self._places(tables)
        grid = (tables.count, heads, -(-tables.most_new // TOKENS_KEPT))
        tokens = TOKENS_KEPT if tables.most_new > 1 else 1
        self.module.keep_paged[grid](self.numbers, *new, *places, TOKENS=tokens, num_warps=4)
        if not self.layer.exact:
            blocks = 1 + (tables.most_new - 1) // self.layer.plan.block + (tables.most_new > 1)
            self.module.quantize_paged[(tables.count, heads, 2 * blocks)](
                self.words,
                self.numbers,
                *new,
                *places,
                **self._widths,
                num_warps=self.tuning.append_warps,
                enable_fp_fusion=False,  # codes are those of the reference, to the last bit
            )

    def _decode(self, q: Tensor, tables: Tables, scale: float, sinks: Tensor | None, out: Tensor) -> None:
        count, query_heads, value_dim = q.shape[0], q.shape[1], out.shape[-1]
        q, heads, widths = q.contiguous(), self.layer.heads, self._widths
        tuning = self.tuning.decode[widths["VALUE_BITS"]]
        registers = tuning.registers_for(max(self.layer.plan.key_head_dim, value_dim))
        pool_splits, splits = self._splits(count * heads, REGISTERS // (32 * registers))
        parts = (count * heads, splits, query_heads // heads)
        partial = torch.empty(*parts, value_dim, dtype=torch.float32, device=q.device)
        log_weights = torch.empty(parts, dtype=torch.float32, device=q.device)
        self.module.decode_paged[parts[:2]](
            q,
            self.words,
            self.numbers,
            partial,
            log_weights,
            *self._places(tables),
            heads,
            self._window,
            pool_splits,
            splits,
            scale,
            **widths,
            CELLS=min(tuning.cells, self.module.BLOCK.value * widths["VALUE_BITS"] // 128),
            PREFETCH=tuning.prefetch,
            num_warps=1,
            num_stages=1,
            maxnreg=registers,
        )
        padded = 1 << (splits - 1).bit_length()
        self.module.merge[(count, query_heads, -(-value_dim // 32))](
            partial,
            log_weights,
            q if sinks is None else sinks,
            out,
            tables.state,
            tables.state.stride(0),
            splits,
            SPLITS_PADDED=padded,
            CHUNK=min(MERGED_AT_ONCE, padded),
            num_warps=4,
        )

    def _splits(self, heads: int, resident: int) -> tuple[int, int]:
        """In how many parts a head's pages are read, and how many that makes with those of its rows; see
        `kernels._splits`. They follow from the longest length, not from those of a step, which the host does not
        know."""
        plan = self.layer.plan
        sight = plan.sliding_window if plan.sliding_window is not None else self.most_blocks * plan.block
        rows = min(sight, self.layer.window + plan.sink) if not self.layer.exact else sight
        row_splits = max(1, -(-rows // ROWS_DECODED))
        places = multiprocessors(self.numbers.device) * resident
        blocks = min(self.most_blocks, -(-sight // plan.block))
        most = max(1, blocks // FEWEST_BLOCKS)
        splits = next((n for n in range(1, most) if heads * n >= 0.9 * places * -(-heads * n // places)), most)
        return splits, splits + row_splits

    def _prefill(
        self, q: Tensor, k: Tensor, v: Tensor, tables: Tables, scale: float, sinks: Tensor | None, out: Tensor
    ) -> None:
        """Attention of any number of new tokens of each sequence, straight over codes and rows."""
        module, heads = self.module, self.layer.heads
        tile = max(1, 64 // module.GROUP_PADDED.value)
        module.prefill_paged[(-(-tables.most_new // tile), heads, tables.count)](
            q,
            self.words,
            self.numbers,
            k,
            v,
            q if sinks is None else sinks,
            out,
            q.stride()[:2],
            k.stride()[:2],
            v.stride()[:2],
            *self._places(tables),
            self._window,
            scale,
            **self._widths,
            TILE=tile,
            STEP=32,
            num_warps=4,
            num_stages=1,
        )
