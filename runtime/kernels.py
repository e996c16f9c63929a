"""Attention over a layer's cache through an artifact's generated Triton kernels.

The host decides what is lowered and when, from lengths that it knows; the kernels read the same lengths from device
memory, so that a captured graph can be replayed as sequences grow.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .backend import NewTokens, lower_until_fit
from .cubins import CompiledKernels
from .errors import InputError
from .layer_cache import LayerCache
from .plan import LayerPlan, block_bytes
from .prefill import Prefill
from .tuning import Tuning, widths_of

SMALLEST_BLOCK = 64
"""The fewest tokens of a block that the kernels can read. Where its codes would not fill LINE_BITS, it needs more."""

CHANNELS_AT_ONCE = 16
"""Head dimensions must be multiples of this, the rows of a matrix operand. Where 16 codes of K would not fill
LANE_BITS, K needs a larger multiple."""

LARGEST_HEAD = 512
"""Channels of the largest head that the kernels hold in registers. The latents of latent attention are larger."""

LANE_BITS = 32
"""Bits of codes that a lane loads at once."""

LINE_BITS = 4 * LANE_BITS
"""Bits that a step of the decode kernel reads of a channel's V codes: one word in each of four lanes."""

ROWS_DECODED = 16
"""Rows of sink and window that a step of the decode kernel reads, and a program of it where that makes no more than
MOST_ROW_SPLITS programs a head."""

MOST_ROW_SPLITS = 16
"""Programs that read a head's rows, where others fill the device: each costs the merge its part."""

PROGRAM_BLOCKS = 1
"""Blocks that a program of the decode kernel would read in the time that its start and its end take."""

REGISTERS = 65536
"""Registers of a multiprocessor."""

MERGED_AT_ONCE = 256
"""Parts of a head that a program of the merging kernel holds at a time."""


@dataclass(frozen=True)
class LayerKernels:
    """`Attention` by the kernels of one layer: a module rendered from `templates/kernels/attention.py.j2`, which Triton
    compiles as it is used, or that module's kernels as they were compiled with the artifact."""

    module: ModuleType | CompiledKernels
    tuning: Tuning
    replayable = True

    @property
    def name(self) -> str:
        return self.module.target if isinstance(self.module, CompiledKernels) else "triton"

    def __deepcopy__(self, memo: dict[int, Any]) -> LayerKernels:
        return self  # nothing in it changes

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        store: LayerCache,
        new: NewTokens,
        scale: float,
        softcap: float | None,
        sinks: Tensor | None,
    ) -> Tensor:
        """See `Attention`; the soft cap is a constant of the kernels."""
        if q.shape[2] == 1:
            self.append(k, v, store, new)
            return self.read(q, None, store, new, scale, softcap, sinks)
        return self._prefill(q, k, v, store, new, scale, sinks).attend(lambda: self.append(k, v, store, new))

    def read(
        self,
        q: Tensor,
        waiting: tuple[Tensor, Tensor] | None,
        store: LayerCache,
        new: NewTokens,
        scale: float,
        softcap: float | None,
        sinks: Tensor | None,
    ) -> Tensor:
        """See `Attention`."""
        if waiting is None:
            assert new.state is not None
            return self.decode(q, store.plan.value_head_dim, store, new.state, scale, sinks)
        return self._prefill(q, *waiting, store, new, scale, sinks).attend()

    def _prefill(
        self, q: Tensor, k: Tensor, v: Tensor, store: LayerCache, new: NewTokens, scale: float, sinks: Tensor | None
    ) -> Prefill:
        q, k, v = map(_with_dense_channels, (q, k, v))
        return Prefill(self.module, self.tuning, q, k, v, store, new, scale, sinks)

    def append(self, k: Tensor, v: Tensor, store: LayerCache, new: NewTokens) -> None:
        """Add new tokens (`k` [B, Hkv, S, key_head_dim], `v` [B, Hkv, S, value_head_dim]) to the layer, which is
        lowered until they fit."""
        k, v = map(_with_dense_channels, (k, v))
        lower_until_fit(self, store, new.state, new.counts)
        heads = k.shape[0] * k.shape[1]
        blocks = store.grow(new.counts)
        if k.shape[2] == 1:
            modes = [("token", 1)]
        else:
            modes = [("blocks", blocks)] * bool(blocks and store.ring) + [("rows", 1)]
        for mode, grid in modes:
            self.module.append[(heads, 2, grid)](
                store.words,
                store.buffers,
                store.head_units,
                k,
                v,
                k.stride()[:3],
                v.stride()[:3],
                new.state,
                k.shape[0],
                store.plan.window,
                store.ring,
                **widths_of(store.plan, store.bits),
                MODE=mode,
                num_warps=self.tuning.append_warps_for(store.bits),
                enable_fp_fusion=False,  # codes are those of the reference, to the last bit
            )

    def lower(self, store: LayerCache, state: Tensor | None) -> None:
        """Rewrite all records from the bits of the present stage to those of the next."""
        plan, batch = store.plan, len(store.rows)
        live = max(store.live_blocks(sequence) for sequence in range(batch))
        with store.lowering() as (before, after):
            for first, last in lowering_order(live, block_bytes(plan, *before), block_bytes(plan, *after)):
                self.module.lower[(batch * plan.num_key_value_heads, last - first)](
                    store.words,
                    store.buffers,
                    store.head_units,
                    first,
                    state,
                    batch,
                    plan.window,
                    store.ring,
                    KEY_BITS=before[0],
                    VALUE_BITS=before[1],
                    KEY_TARGET=after[0],
                    VALUE_TARGET=after[1],
                    num_warps=self.tuning.lower_warps,
                )

    def decode(
        self, q: Tensor, value_dim: int, store: LayerCache, state: Tensor, scale: float, sinks: Tensor | None
    ) -> Tensor:
        """Attention [B, Hq, 1, value_dim] of one query a sequence, `q` [B, Hq, 1, key_head_dim], over the layer."""
        batch, query_heads = q.shape[:2]
        heads, widths = batch * store.plan.num_key_value_heads, widths_of(store.plan, store.bits)
        launch = self.decode_launch(store.plan, widths["VALUE_BITS"])
        rows = store.plan.sink + store.plan.window
        pool_splits, splits = splits_of(heads, store.capacity(), rows, places_of(q.device, launch["maxnreg"]))
        parts = (heads, splits, query_heads * batch // heads)
        partial = torch.empty(*parts, value_dim, dtype=torch.float32, device=q.device)
        log_weights = torch.empty(parts, dtype=torch.float32, device=q.device)
        self.module.decode[parts[:2]](
            q.contiguous(),
            store.words,
            store.buffers,
            partial,
            log_weights,
            state,
            store.head_units,
            batch,
            store.plan.window,
            store.ring,
            pool_splits,
            splits,
            scale,
            **widths,
            **launch,
        )
        out = torch.empty(batch, query_heads, 1, value_dim, dtype=q.dtype, device=q.device)
        self.module.merge[(batch, query_heads, -(-value_dim // 32))](
            partial,
            log_weights,
            q if sinks is None else sinks,
            out,
            state,
            batch,
            splits,
            **merge_launch(splits),
            **overlap(self.module, q.device),
        )
        return out

    def decode_launch(self, plan: LayerPlan, value_bits: int) -> dict[str, int]:
        """Constants and options that the decode kernel of a layer is launched with."""
        tuning, words = self.tuning.decode[value_bits], self.module.BLOCK.value * value_bits // LINE_BITS
        return {
            "CELLS": min(tuning.cells, words),  # a line of V codes has so many words for one of four lanes
            "PREFETCH": tuning.prefetch,
            "num_warps": 1,
            "num_stages": 1,
            "maxnreg": tuning.registers_for(max(plan.key_head_dim, plan.value_head_dim)),
        }


def _with_dense_channels(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def overlap(module: Any, device: torch.device) -> dict[str, bool]:
    """Options of a kernel that may be launched before the one in front of it has ended, for which it waits itself.

    Only Triton can launch it so. Where Triton compiles beforehand, the module names the device in `target_device`.
    """
    place = device if isinstance(module, ModuleType) else vars(module).get("target_device")
    return {"launch_pdl": True} if place is not None and overlaps(place) else {}


@lru_cache
def overlaps(device: torch.device) -> bool:
    """Whether a device can launch a kernel before the one in front of it has ended."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


@lru_cache
def splits_of(heads: int, blocks: int, rows: int, places: int) -> tuple[int, int]:
    """In how many parts `blocks` of a head are read, and how many parts that makes with those of its `rows`.

    They are the fewest that are done soonest on a device that runs `places` programs at once. The programs of rows are
    short and come last, where the others leave places empty; where nothing is quantized, everything is rows.
    """
    row_steps = -(-rows // ROWS_DECODED)
    row_splits = min(row_steps, max(MOST_ROW_SPLITS, places // heads))

    def time(splits: int) -> float:
        longest = -(-blocks // splits) + PROGRAM_BLOCKS
        work = splits * longest + row_steps + row_splits * PROGRAM_BLOCKS
        return max(longest * -(-heads * splits // places), work * heads / places)

    splits = min(range(1, max(1, min(blocks, 8 + 4 * places // heads)) + 1), key=time)
    return splits, splits + row_splits


def unreadable(plan: LayerPlan) -> str | None:
    """Why the kernels cannot read a layer's blocks; None if they can."""
    widest = max(plan.key_head_dim, plan.value_head_dim)
    if widest > LARGEST_HEAD:
        return f"head_dim {widest} is more than {LARGEST_HEAD}, the most that the Triton kernels hold"
    key_channels = max(CHANNELS_AT_ONCE, LANE_BITS // plan.key_bits)
    for channels, unit in ((plan.key_head_dim, key_channels), (plan.value_head_dim, CHANNELS_AT_ONCE)):
        if channels % unit:
            return f"head_dim {channels} is not a multiple of {unit}, which the Triton kernels need"
    smallest = max(SMALLEST_BLOCK, LINE_BITS // plan.value_bits)
    if plan.quantized and (plan.block < smallest or plan.block & (plan.block - 1)):
        return f"a block of {plan.block} tokens is not a power of two from {smallest} up, which the Triton kernels need"
    return None


def check_kernels(plan: LayerPlan) -> None:
    """Raises `InputError` where the kernels cannot read a layer's blocks."""
    reason = unreadable(plan)
    if reason is not None:
        raise InputError(f'{reason}; load with backend="reference"')


def lowering_order(live: int, wide: int, narrow: int) -> Iterator[tuple[int, int]]:
    """Runs of slots to be lowered one after another, the slots of a run all at once.

    The records of `narrow` bytes that a run writes end where the run's records of `wide` bytes begin, so none is
    written over a record that is still to be read. The first slot's record is written over itself.
    """
    first, last = 0, 1
    while first < live:
        yield first, min(last, live)
        first, last = last, max(last + 1, last * wide // narrow)


def merge_launch(splits: int) -> dict[str, int]:
    """Constants and options that the merge of so many parts is launched with."""
    padded = 1 << (splits - 1).bit_length()
    return {"SPLITS_PADDED": padded, "CHUNK": min(MERGED_AT_ONCE, padded), "num_warps": 4}


def places_of(device: torch.device, registers: int) -> int:
    """Single warps of `registers` a lane that a device runs at once."""
    return multiprocessors(device) * (REGISTERS // (32 * registers))


def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a device; "meta" stands for one that is larger than any there is."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 256 if device.type == "meta" else 1
