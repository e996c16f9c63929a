"""The generated kernels against attention over a bf16 cache, on the CUDA device that is there.

    python examples/benchmarks/kernels.py                       # everything
    python examples/benchmarks/kernels.py --only decode,append

`decode`: one token's attention, against the best of cuDNN SDPA, flash SDPA and a Triton kernel over bf16. `append`: one
token into the cache, against the decode attention of the same step. `shrink`: codes lowered in place, against the
device's copy bandwidth. `prefill`: a prompt in chunks, against flash attention over the whole prompt.

Every row is measured in the same run as what it is compared with: medians of replayed CUDA graphs over random data, the
second-level cache emptied before each. Writes DIR/kernels.csv, kernels.md and kernels.svg.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import importlib.util
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F
from bf16_decode import bf16_decode
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from pmkvq_compiler.kernel_source import kernel_source
from pmkvq_compiler.runtime.attention import cached_attention
from pmkvq_compiler.runtime.cache import Cache
from pmkvq_compiler.runtime.kernels import LayerKernels, lowering_order, tuning_for
from pmkvq_compiler.runtime.plan import CachePlan, KeyAxis, LayerPlan, block_bytes, sequence_bytes

DEVICE = torch.device("cuda")
FILL_CHUNK = 4096


@dataclass(frozen=True)
class Shape:
    batch: int
    tokens: int
    head_dim: int = 128
    heads: int = 4
    group: int = 7

    def __str__(self) -> str:
        return f"batch {self.batch}, {self.heads} x {self.group} heads of {self.head_dim}, {self.tokens:,} tokens"


@dataclass(frozen=True)
class Row:
    """One measurement: `ratio` is the baseline's time over ours (of a shrink: bandwidth over that of a copy)."""

    kernel: str
    shape: str
    what: str
    microseconds: float
    gigabytes_a_second: float
    baseline: str
    baseline_microseconds: float
    ratio: float
    ideal: float


DECODE_SHAPES = (Shape(32, 32768), Shape(8, 32768), Shape(1, 32768), Shape(32, 32768, head_dim=64))
AXES: tuple[tuple[KeyAxis, int], ...] = (("channel", 64), ("channel", 128), ("token", 64))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="decode,append,shrink,prefill", help="parts to run (%(default)s)")
    parser.add_argument("--output", type=Path, default=Path("out/kernels"))
    arguments = parser.parse_args()
    torch.manual_seed(0)
    parts = {"decode": decode_rows, "append": append_rows, "shrink": shrink_rows, "prefill": prefill_rows}
    rows = []
    for name in arguments.only.split(","):
        for row in parts[name]():
            print(
                f"{row.kernel:8} {row.shape}  {row.what:24} {row.microseconds:9.1f} us {row.gigabytes_a_second:6.0f} "
                f"GB/s  {row.baseline} {row.baseline_microseconds:.1f} us  {row.ratio:.2f} of {row.ideal:.2f}",
                flush=True,
            )
            rows.append(row)
    write(rows, arguments.output)


# ---- a packed cache with random contents ----


def layer_plan(
    shape: Shape, bits: tuple[int, int], axis: KeyAxis, block: int, stages: tuple[tuple[int, int], ...] = ()
):
    layer = LayerPlan(
        num_key_value_heads=shape.heads,
        key_head_dim=shape.head_dim,
        value_head_dim=shape.head_dim,
        key_bits=bits[0],
        value_bits=bits[1],
        key_axis=axis,
        sink=4,
        window=128,
        block=block,
        sliding_window=None,
        stages=stages or (bits,),
        arena_bytes=0,
    )
    widest = sequence_bytes(layer, shape.tokens, 2, stage=0)
    return dataclasses.replace(layer, arena_bytes=shape.batch * widest)


def packed_cache(shape: Shape, layer: LayerPlan) -> Cache:
    plan = CachePlan("best", layer.arena_bytes, shape.tokens, shape.batch, "bfloat16", (layer,))
    module = import_source(kernel_source(layer, shape.group, None, False, str(shape)))
    kernels = [LayerKernels(module, tuning_for(DEVICE))]
    return Cache(plan, shape.batch, shape.tokens, torch.bfloat16, DEVICE, kernels)


def import_source(text: str) -> ModuleType:
    name = f"kernels_{abs(hash(text)):x}"
    path = Path(tempfile.mkdtemp()) / f"{name}.py"
    path.write_text(text, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def random_heads(shape: Shape, heads: int, tokens: int) -> Tensor:
    return torch.randn(shape.batch, heads, tokens, shape.head_dim, device=DEVICE, dtype=torch.bfloat16)


def fill(cache: Cache, shape: Shape, tokens: int) -> None:
    """Append random tokens until every sequence has `tokens`."""
    kernels = cache.kernels
    assert kernels is not None
    for start in range(cache.length[0], tokens, FILL_CHUNK):
        count = min(FILL_CHUNK, tokens - start)
        cache.begin([slice(0, count)] * shape.batch)
        keys, values = (random_heads(shape, shape.heads, count) for _ in range(2))
        kernels[0]._append(keys, values, cache, cache.layers[0])
        cache.end()


# ---- measuring ----


def microseconds(work: Callable[[], object], repeats: int = 30) -> float:
    """Median time of `work` in a CUDA graph, the second-level cache emptied before each replay."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        work()
    flush = torch.empty(256 << 20, dtype=torch.int8, device=DEVICE)
    times = []
    for _ in range(repeats + 3):
        flush.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1e3)
    return statistics.median(times[3:])


def sdpa(backend: SDPBackend) -> AbstractContextManager[None]:
    return sdpa_kernel(backend)


def bf16_best(shape: Shape) -> tuple[str, float]:
    """The fastest decode attention over a bf16 cache, and its time."""
    q = random_heads(shape, shape.heads * shape.group, 1)
    k, v = (random_heads(shape, shape.heads, shape.tokens) for _ in range(2))
    found: dict[str, float] = {}
    for name, backend in (("cuDNN", SDPBackend.CUDNN_ATTENTION), ("flash", SDPBackend.FLASH_ATTENTION)):
        with sdpa(backend):
            found[name] = microseconds(lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=True))
    programs = torch.cuda.get_device_properties(DEVICE).multi_processor_count
    for waves in (2, 4, 8):
        splits = max(1, programs * waves // (shape.batch * shape.heads))
        for tile, warps, stages in ((64, 4, 3), (128, 4, 2), (128, 8, 3)):
            taken = microseconds(lambda: bf16_decode(q, k, v, splits, tile, warps, stages), 10)  # noqa: B023
            found["Triton"] = min(taken, found.get("Triton", taken))
    print(f"bf16, {shape}: " + ", ".join(f"{name} {taken:.1f} us" for name, taken in found.items()), flush=True)
    return min(found.items(), key=lambda pair: pair[1])


def decode_rows() -> Iterator[Row]:
    for shape in DECODE_SHAPES:
        name, baseline = bf16_best(shape)
        bf16_bytes = 4 * shape.batch * shape.heads * shape.tokens * shape.head_dim
        for axis, block in AXES:
            for bits in ((8, 8), (4, 4), (4, 2), (2, 2)):
                layer = layer_plan(shape, bits, axis, block)
                cache = packed_cache(shape, layer)
                fill(cache, shape, shape.tokens - 1)
                cache.begin([slice(0, 1)] * shape.batch)
                q = random_heads(shape, shape.heads * shape.group, 1)
                store, kernels = cache.layers[0], cache.kernels
                assert kernels is not None
                scale = shape.head_dim**-0.5
                taken = microseconds(lambda: kernels[0]._decode(q, shape.head_dim, cache, store, scale, None))  # noqa: B023
                packed = shape.batch * shape.heads * store.live_blocks(0) * block_bytes(layer, *bits)
                yield Row(
                    "decode", str(shape), f"K {bits[0]} V {bits[1]}, {axis} {block}", taken, packed / taken / 1e3,
                    f"bf16 {name}", baseline, baseline / taken, bf16_bytes / packed,
                )  # fmt: skip


def append_rows() -> Iterator[Row]:
    """A token that finds room in the window, and one that sends a block away, in shares of the step's attention."""
    shape = DECODE_SHAPES[0]
    for axis, block in AXES[:1]:
        for bits in ((4, 4), (2, 2)):
            layer = layer_plan(shape, bits, axis, block)
            cache = packed_cache(shape, layer)
            store, kernels = cache.layers[0], cache.kernels
            assert kernels is not None
            fill(cache, shape, shape.tokens - 2 * block)
            window = layer.sink + layer.window
            until_full = (window - store.rows[0]) % block
            fill(cache, shape, cache.length[0] + until_full)
            q = random_heads(shape, shape.heads * shape.group, 1)
            k, v = (random_heads(shape, shape.heads, 1) for _ in range(2))
            scale = shape.head_dim**-0.5

            def token(counted: bool) -> float:
                cache.begin([slice(0, 1)] * shape.batch)
                rows, flushed = list(store.rows), list(store.flushed)

                def work() -> None:
                    store.rows, store.flushed = list(rows), list(flushed)
                    kernels[0]._append(k, v, cache, store)

                taken = microseconds(work)
                if counted:
                    cache.end()
                return taken

            flush = token(counted=True)
            plain = token(counted=False)
            attention = microseconds(lambda: kernels[0]._decode(q, shape.head_dim, cache, store, scale, None))  # noqa: B023
            for what, taken in (("without flush", plain), ("with flush", flush)):
                yield Row(
                    "append", str(shape), f"{what}, K {bits[0]} V {bits[1]}", taken, 0.0, "decode", attention,
                    attention / taken, 20.0,
                )  # fmt: skip


def shrink_rows() -> Iterator[Row]:
    """A gigabyte of codes lowered in place; bytes read and written against those of a copy."""
    source = torch.empty(1 << 30, dtype=torch.int8, device=DEVICE)
    target = torch.empty_like(source)
    copied = 2 * source.nbytes / microseconds(lambda: target.copy_(source)) / 1e3
    for wide, narrow in (((16, 16), (8, 8)), ((8, 8), (4, 4)), ((4, 4), (2, 2)), ((4, 4), (4, 2))):
        tokens = 2**30 * 8 // (32 * 4 * 128 * (wide[0] + wide[1]))
        shape = Shape(32, tokens // 64 * 64 + 132)
        layer = layer_plan(shape, narrow, "channel", 64, (wide, narrow))
        cache = packed_cache(shape, layer)
        fill(cache, shape, shape.tokens)
        cache.begin([slice(0, 0)] * shape.batch)
        store, kernels = cache.layers[0], cache.kernels
        assert kernels is not None
        live = store.live_blocks(0)
        moved = live * shape.batch * shape.heads * (block_bytes(layer, *wide) + block_bytes(layer, *narrow))
        launches = len(list(lowering_order(live, block_bytes(layer, *wide), block_bytes(layer, *narrow))))
        taken = microseconds(lambda: kernels[0]._shrink(cache, store, 1), 10)  # noqa: B023
        speed = moved / taken / 1e3
        yield Row(
            "shrink", f"{launches} launches", f"{wide} to {narrow}", taken, speed, "copy", moved / copied / 1e3,
            speed / copied, 1.0,
        )  # fmt: skip


def prefill_rows() -> Iterator[Row]:
    """A prompt of 32,768 tokens, quantized as it is read, against flash attention over all of it at once."""
    shape = Shape(1, 32768)
    scale = shape.head_dim**-0.5
    q = random_heads(shape, shape.heads * shape.group, shape.tokens)
    k, v = (random_heads(shape, shape.heads, shape.tokens) for _ in range(2))
    baselines = {}
    for name, backend in (("flash", SDPBackend.FLASH_ATTENTION), ("cuDNN", SDPBackend.CUDNN_ATTENTION)):
        with sdpa(backend):
            work = lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)  # noqa: E731
            baselines[name] = seconds_and_peak(work)
            print(f"prefill bf16 {name}: {baselines[name][0]:.0f} us, {baselines[name][1] >> 20} MiB", flush=True)
    baseline, whole = baselines["flash"]
    for bits in ((16, 16), (8, 8), (4, 4), (2, 2)):
        for chunk in (512, 2048, 8192):
            layer = layer_plan(shape, bits, "channel", 64)
            cache = packed_cache(shape, layer)

            def prompt() -> None:
                cache.reset()
                for start in range(0, shape.tokens, chunk):  # noqa: B023
                    part = slice(start, start + chunk)  # noqa: B023
                    cache.begin([slice(0, chunk)])  # noqa: B023
                    cached_attention(q[:, :, part], k[:, :, part], v[:, :, part], cache, 0, scale)
                    cache.end()

            taken, peak = seconds_and_peak(prompt)
            yield Row(
                "prefill", f"{shape}, peak {(peak + cache.bytes_reserved) >> 20} MiB ({(whole + k.nbytes + v.nbytes) >> 20})",
                f"K {bits[0]} V {bits[1]}, chunks of {chunk}", taken, 0.0, "bf16 flash", baseline, baseline / taken, 1.0,
            )  # fmt: skip


def seconds_and_peak(work: Callable[[], object], repeats: int = 5) -> tuple[float, int]:
    """Median microseconds, and the most bytes allocated beyond what was there before."""
    work()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1e3)
    return statistics.median(times), torch.cuda.max_memory_allocated() - before


def write(rows: list[Row], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "kernels.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=[field.name for field in dataclasses.fields(Row)])
        writer.writeheader()
        writer.writerows(dataclasses.asdict(row) for row in rows)


if __name__ == "__main__":
    main()
