"""Attention over the progressive cache through an artifact's generated Triton kernels.

The host decides what is lowered and when, from lengths that it knows; the kernels read the same lengths from device
memory, so that a captured graph can be replayed as sequences grow.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass, fields
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .cubins import CompiledKernels
from .errors import ArtifactError, InputError
from .manifest import AGAIN, conform, parse_json
from .plan import CODE_BITS, FINAL_BITS, LayerPlan, block_bytes

if TYPE_CHECKING:
    from .cache import Cache, LayerCache

SMALLEST_BLOCK = 64
"""Tokens of a block that the kernels are made for. It takes more where its codes would not fill LINE_BITS."""

CHANNELS_AT_ONCE = 16
"""Rows of a matrix operand, which are channels of V. A key takes more where its codes would not fill LANE_BITS."""

LANE_BITS = 32
"""Bits of codes that a lane loads at once."""

LINE_BITS = 4 * LANE_BITS
"""Bits of a line of V codes that a step of the decode kernel takes: a word of each of four lanes."""

ROWS_COPIED = 64
"""Tokens outside the pool that a program of the unpacking kernel takes at once."""

ROWS_DECODED = 64
"""Rows of sink and window that a program of the decode kernel reads."""

FEWEST_BLOCKS = 4
"""Blocks of the pool that are worth a program of the decode kernel, whose part must be merged with the others."""

REGISTERS = 65536
"""Registers of a multiprocessor."""

LARGEST_REGISTERS = 248
"""Registers of a lane, of which eight single warps have the most that can be had."""

MERGED_AT_ONCE = 64
"""Parts of a head that a program of the merging kernel holds at a time."""


@dataclass(frozen=True)
class DecodeTuning:
    """The decode kernel runs in single warps of so many `registers` a lane, for heads of 128 channels; a lane takes
    `cells` words of V in a step, and blocks of the pool are asked for `prefetch` ahead."""

    cells: int
    registers: int
    prefetch: int

    def registers_for(self, channels: int) -> int:
        """Sums of values and queries take registers in proportion to a head's channels."""
        return LARGEST_REGISTERS if channels > 128 else min(self.registers, 128) if channels <= 64 else self.registers


@dataclass(frozen=True)
class Tuning:
    """How kernels are launched; none of it changes what they compute.

    `decode[bits]` is for V of that width.
    """

    decode: dict[int, DecodeTuning]
    prefill_tile: int
    prefill_step: int
    prefill_warps: int
    prefill_stages: int
    append_warps: int = 4
    lower_warps: int = 8
    prefill_scratch: int = 256 << 20
    """Bytes for what new tokens attend to, unpacked."""

    def prefill_shape(self, channels: int, dtype: torch.dtype) -> tuple[int, int]:
        """Queries and keys of a step of the prefill kernel. Wide keys are taken fewer at a time, for the sake of shared
        memory, and fp32 numbers, which are no operands of the matrix unit, in tiles that registers hold."""
        if dtype == torch.float32:
            return 32, 16
        return self.prefill_tile, self.prefill_step if channels <= 128 else self.prefill_step // 2


TUNING, DEFAULT_TUNING = "tuning.json", "default"


def read_tunings(text: str) -> dict[str, Tuning]:
    """A table of tunings (JSON) by a part of the device's name; one of them is "default", for all other devices.

    Raises `ArtifactError` where it is something else.
    """
    tunings: dict[str, Tuning] = conform(parse_json(text.encode(), TUNING), dict[str, Tuning], TUNING)
    if DEFAULT_TUNING not in tunings:
        raise ArtifactError(f"{TUNING} has nothing for {DEFAULT_TUNING!r}; {AGAIN}")
    for tuning in tunings.values():
        decode = [number for one in tuning.decode.values() for number in astuple(one)]
        launch = [getattr(tuning, field.name) for field in fields(tuning) if field.name != "decode"]
        if tuning.decode.keys() != {*CODE_BITS}:
            widths = ", ".join(map(str, CODE_BITS))
            raise ArtifactError(f"{TUNING} does not say how V is decoded at exactly {widths} bits; {AGAIN}")
        if min(decode) < 0 or min(launch) < 1:
            raise ArtifactError(f"{TUNING} has numbers that no kernel can be launched with; {AGAIN}")
    return tunings


def tuning_for(device: torch.device, tunings: dict[str, Tuning]) -> Tuning:
    """How to launch kernels on a device: as was measured on it, or cautiously."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((tuning for known, tuning in tunings.items() if known in name), tunings[DEFAULT_TUNING])


@dataclass(frozen=True)
class LayerKernels:
    """The kernels of one layer: a module rendered from `templates/kernels/attention.py.j2`, which Triton compiles as it
    is used, or what was compiled of it with the artifact."""

    module: ModuleType | CompiledKernels
    tuning: Tuning

    def __deepcopy__(self, memo: dict[int, Any]) -> LayerKernels:
        return self  # code, and how it is launched

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, cache: Cache, layer: int, scale: float, sinks: Tensor | None
    ) -> Tensor:
        """`cached_attention` of one layer; the soft cap is a constant of the kernels."""
        store = cache.layers[layer]
        assert cache.state is not None
        q, k, v = (tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in (q, k, v))
        if q.shape[2] == 1:
            self._append(k, v, cache, store)
            return self._decode(q, v.shape[-1], cache, store, scale, sinks)
        out = self._prefill(q, k, v, cache, store, scale, sinks)
        self._append(k, v, cache, store)
        return out

    def lower_until_fit(self, cache: Cache, store: LayerCache, counts: Sequence[int]) -> None:
        """Lower the layer until `counts` new tokens of the sequences fit, once `cache.begin` has told the device where
        it stands."""
        for stage in store.stages_until_fit(counts):
            store.overwritten = True
            self.lower(cache, store, stage)
            store.stage = stage

    def _append(self, k: Tensor, v: Tensor, cache: Cache, store: LayerCache) -> None:
        """Add the call's tokens to the cache, lowering the layer until they fit."""
        counts = [own.stop - own.start for own in cache.columns]
        self.lower_until_fit(cache, store, counts)
        heads = k.shape[0] * k.shape[1]
        blocks = store.grow(counts)
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
                cache.state,
                k.shape[0],
                store.plan.window,
                store.ring,
                **_widths(store),
                MODE=mode,
                num_warps=self.tuning.append_warps,
                enable_fp_fusion=False,  # codes are those of the reference, to the last bit
            )

    def lower(self, cache: Cache, store: LayerCache, stage: int) -> None:
        """Rewrite the records that are held at the present stage for `stage`."""
        plan = store.plan
        before, after = plan.stages[store.stage], plan.stages[stage]
        live = max(store.live_blocks(sequence) for sequence in range(cache.batch_size))
        heads = cache.batch_size * plan.num_key_value_heads
        for first, last in lowering_order(live, block_bytes(plan, *before), block_bytes(plan, *after)):
            self.module.lower[(heads, last - first)](
                store.words,
                store.buffers,
                store.head_units,
                first,
                cache.state,
                cache.batch_size,
                plan.window,
                store.ring,
                KEY_BITS=before[0],
                VALUE_BITS=before[1],
                KEY_TARGET=after[0],
                VALUE_TARGET=after[1],
                num_warps=self.tuning.lower_warps,
            )

    def _decode(
        self, q: Tensor, value_dim: int, cache: Cache, store: LayerCache, scale: float, sinks: Tensor | None
    ) -> Tensor:
        batch, query_heads = q.shape[:2]
        q = q.contiguous()
        heads = batch * store.plan.num_key_value_heads
        widths = _widths(store)
        tuning = self.tuning.decode[widths["VALUE_BITS"]]
        registers = tuning.registers_for(max(store.plan.key_head_dim, store.plan.value_head_dim))
        pool_splits, splits = _splits(heads, store, REGISTERS // (32 * registers))
        parts = (heads, splits, query_heads * batch // heads)
        partial = torch.empty(*parts, value_dim, dtype=torch.float32, device=q.device)
        log_weights = torch.empty(parts, dtype=torch.float32, device=q.device)
        self.module.decode[parts[:2]](
            q,
            store.words,
            store.buffers,
            partial,
            log_weights,
            cache.state,
            store.head_units,
            batch,
            store.plan.window,
            store.ring,
            pool_splits,
            splits,
            scale,
            **widths,
            CELLS=min(tuning.cells, self.largest_cells(widths["VALUE_BITS"])),
            PREFETCH=tuning.prefetch,
            num_warps=1,
            num_stages=1,
            maxnreg=registers,
        )
        out = torch.empty(batch, query_heads, 1, value_dim, dtype=q.dtype, device=q.device)
        padded = 1 << (splits - 1).bit_length()
        self.module.merge[(batch, query_heads, -(-value_dim // 32))](
            partial,
            log_weights,
            q if sinks is None else sinks,
            out,
            cache.state,
            batch,
            splits,
            SPLITS_PADDED=padded,
            CHUNK=min(MERGED_AT_ONCE, padded),
            num_warps=4,
        )
        return out

    def largest_cells(self, bits: int) -> int:
        """32-bit words of a line of V codes that one of four lanes has."""
        return self.module.BLOCK.value * bits // LINE_BITS

    def _prefill(
        self, q: Tensor, k: Tensor, v: Tensor, cache: Cache, store: LayerCache, scale: float, sinks: Tensor | None
    ) -> Tensor:
        """Attention of new tokens: what they attend to is unpacked, for as many heads at once as the scratch
        holds; one head of one sequence may take more than that."""
        batch, query_heads, columns = q.shape[:3]
        plan, module, tuning = store.plan, self.module, self.tuning
        out = torch.zeros(batch, query_heads, columns, v.shape[-1], dtype=q.dtype, device=q.device)  # of padding too
        dtype = torch.float32 if q.dtype == torch.float32 else torch.float16
        counts = [own.stop - own.start for own in cache.columns]
        live = [store.live_blocks(sequence) for sequence in range(batch)]
        copied = [rows + count for rows, count in zip(store.rows, counts, strict=True)]
        tokens = max(blocks * plan.block + rows for blocks, rows in zip(live, copied, strict=True))
        pieces = max(blocks + -(-rows // ROWS_COPIED) for blocks, rows in zip(live, copied, strict=True))
        capacity = -(-tokens // ROWS_COPIED) * ROWS_COPIED
        heads = batch * plan.num_key_value_heads
        channels = module.KEY_PADDED.value + module.VALUE_PADDED.value
        at_once = min(heads, max(1, tuning.prefill_scratch // (capacity * channels * dtype.itemsize)))
        keys, values = (
            torch.empty(at_once, capacity, padded.value, dtype=dtype, device=q.device)
            for padded in (module.KEY_PADDED, module.VALUE_PADDED)
        )
        tile, step = tuning.prefill_shape(max(keys.shape[-1], values.shape[-1]), dtype)
        for first in range(0, heads, at_once):
            some = min(at_once, heads - first)
            module.unpack[(pieces, 2, some)](
                store.words,
                store.buffers,
                k,
                v,
                keys,
                values,
                cache.state,
                k.stride()[:3],
                v.stride()[:3],
                store.head_units,
                first,
                batch,
                plan.window,
                store.ring,
                capacity,
                **_widths(store),
                ROWS=ROWS_COPIED,
                num_warps=4,
            )
            module.prefill[(-(-columns // tile), query_heads // plan.num_key_value_heads, some)](
                q,
                keys,
                values,
                q if sinks is None else sinks,
                out,
                cache.state,
                q.stride()[:3],
                columns,
                first,
                batch,
                plan.window,
                store.ring,
                capacity,
                scale,
                TILE=tile,
                STEP=step,
                num_warps=tuning.prefill_warps,
                num_stages=tuning.prefill_stages,
            )
        return out


def _splits(heads: int, store: LayerCache, resident: int) -> tuple[int, int]:
    """In how many parts a head's pool is read, and how many parts that makes with those of its rows.

    As few as keep nine in ten of the places busy that the device has for programs, `resident` a multiprocessor, and no
    smaller than is worth a program.
    """
    row_splits = -(-(store.plan.sink + store.plan.window) // ROWS_DECODED)
    places = multiprocessors(store.arena.device) * resident
    most = max(1, store.capacity() // FEWEST_BLOCKS)
    splits = next((n for n in range(1, most) if heads * n >= 0.9 * places * -(-heads * n // places)), most)
    return splits, splits + row_splits


def check_kernels(plan: LayerPlan) -> None:
    """Raises `InputError` where the kernels cannot read a layer's blocks."""
    key_channels = max(CHANNELS_AT_ONCE, LANE_BITS // plan.key_bits)
    for channels, unit in ((plan.key_head_dim, key_channels), (plan.value_head_dim, CHANNELS_AT_ONCE)):
        if channels % unit:
            raise InputError(
                f"head_dim {channels} is not a multiple of {unit}, which the Triton kernels need; "
                f'load with backend="reference"'
            )
    smallest = max(SMALLEST_BLOCK, LINE_BITS // plan.value_bits)
    if plan.quantized and (plan.block < smallest or plan.block & (plan.block - 1)):
        raise InputError(
            f"a block of {plan.block} tokens is not a power of two from {smallest} up, which the Triton kernels "
            f'need; load with backend="reference", or compile with a recipe of longer blocks'
        )


def lowering_order(live: int, wide: int, narrow: int) -> Iterator[tuple[int, int]]:
    """Runs of slots to be lowered one after another, the slots of a run all at once.

    The records of `narrow` bytes that a run writes end where the run's records of `wide` bytes begin, so none is
    written over a record that is still to be read. The first slot's record is written over itself.
    """
    first, last = 0, 1
    while first < live:
        yield first, min(last, live)
        first, last = last, max(last + 1, last * wide // narrow)


def _widths(store: LayerCache) -> dict[str, Any]:
    """Present widths; any that the kernels know where nothing is quantized."""
    key_bits, value_bits = store.bits if store.plan.quantized else (FINAL_BITS[0], FINAL_BITS[0])
    return {"KEY_BITS": key_bits, "VALUE_BITS": value_bits}


def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a device; "meta" stands for one that is larger than any there is."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 256 if device.type == "meta" else 1
