"""The generated kernels against attention over a bf16 cache, on a CUDA device.

    python examples/benchmarks/kernel_times.py                       # everything
    python examples/benchmarks/kernel_times.py --only decode,append

`decode`: one token's attention, against the best of cuDNN SDPA, flash SDPA and a Triton kernel over bf16. `append`: one
token into the cache, against the decode attention of the same step. `lower`: codes lowered in place, against the
device's copy bandwidth. `prefill`: a prompt in chunks, against flash attention over the whole prompt.

Every row and its baseline are measured in the same run, after what they compute was compared (`gate.py`): a kernel that
is wrong gets no row, and the exit code is 1. Times are medians of replayed CUDA graphs over random data, with the
second-level cache emptied before each. Writes DIR/kernels.csv, kernels.md and kernels.svg.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import functools
import importlib.util
import itertools
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import gate
import torch
import torch.nn.functional as F
from bf16_decode import bf16_decode
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from pmkvq_compiler.emit.kernel_source import kernel_source, tuning_table
from pmkvq_compiler.runtime.attention import cached_attention
from pmkvq_compiler.runtime.cache import Cache
from pmkvq_compiler.runtime.generate import PREFILL_CHUNK
from pmkvq_compiler.runtime.kernels import LayerKernels, lowering_order
from pmkvq_compiler.runtime.layer_cache import LayerCache
from pmkvq_compiler.runtime.plan import CachePlan, KeyAxis, LayerPlan, block_bytes, sequence_bytes
from pmkvq_compiler.runtime.tuning import read_tunings, tuning_for

DEVICE = torch.device("cuda")
FILL_CHUNK = 4096
CYCLES_ASLEEP = 200_000_000
"""A tenth of a second, in which a host launches the work of the smallest chunks."""


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
    """One measurement. `ratio` is the baseline's time over ours (for `lower`, our bandwidth over that of a copy)."""

    kernel: str
    shape: str
    what: str
    microseconds: float
    gigabytes_a_second: float
    baseline: str
    baseline_microseconds: float
    ratio: float
    ideal: float


LARGE, MEDIUM, SINGLE, SHORT = Shape(32, 32768), Shape(8, 32768), Shape(1, 32768), Shape(1, 4096)
NARROW = Shape(32, 32768, head_dim=64)
Packing = tuple[KeyAxis, int, tuple[int, int]]
"""Axis of K's groups, tokens of a block, and bits of K and V."""

CHANNEL_64: tuple[Packing, ...] = tuple(("channel", 64, bits) for bits in ((8, 8), (4, 4), (2, 2)))
DECODED: dict[Shape, tuple[Packing, ...]] = {
    LARGE: (
        *CHANNEL_64,
        ("channel", 64, (4, 2)),
        *(("channel", 128, bits) for bits in ((8, 8), (4, 4), (2, 2))),
        *(("token", 64, bits) for bits in ((8, 8), (4, 4), (2, 2))),
    ),
    MEDIUM: CHANNEL_64,
    SINGLE: CHANNEL_64,
    SHORT: CHANNEL_64,
    NARROW: CHANNEL_64,
}
PREFILLED = ((16, 16), (8, 8), (4, 4), (2, 2))
CHUNKS = (8192, PREFILL_CHUNK, 2048, 512)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="decode,append,lower,prefill", help="parts to run (%(default)s)")
    parser.add_argument("--output", type=Path, default=Path("out/kernels"))
    arguments = parser.parse_args()
    torch.manual_seed(0)
    parts = {"decode": decode_rows, "append": append_rows, "lower": lower_rows, "prefill": prefill_rows}
    rows, wrong = [], 0
    for measured in itertools.chain.from_iterable(parts[name]() for name in arguments.only.split(",")):
        try:
            row = measured()
        except gate.WrongKernelError as error:
            print(error, flush=True)
            wrong += 1
            continue
        print(line(row), flush=True)
        rows.append(row)
    write(rows, arguments.output)
    if wrong:
        sys.exit(f"{wrong} kernels are wrong and were not timed")


def line(row: Row) -> str:
    """A row of the Markdown table."""
    speed = f"{row.gigabytes_a_second:,.0f}" if row.gigabytes_a_second else ""
    return (
        f"| {row.kernel} | {row.shape} | {row.what} | {row.microseconds:,.1f} | {speed} | "
        f"{row.baseline} {row.baseline_microseconds:,.1f} | {row.ratio:.2f} | {row.ideal:.2f} |"
    )


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


def packed_cache(shape: Shape, layer: LayerPlan) -> tuple[Cache, LayerKernels, LayerCache]:
    """An empty cache of one layer, the layer's kernels and its store."""
    plan = CachePlan("best", layer.arena_bytes, shape.tokens, shape.batch, "bfloat16", (layer,))
    module = import_source(kernel_source(layer, shape.group, None, False, str(shape)))
    kernels = LayerKernels(module, tuning_for(DEVICE, read_tunings(tuning_table())))
    cache = Cache(plan, shape.batch, shape.tokens, torch.bfloat16, DEVICE, [kernels])
    return cache, kernels, cache.layers[0]


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
    (kernels,) = cache.attention
    assert isinstance(kernels, LayerKernels)
    for start in range(cache.length[0], tokens, FILL_CHUNK):
        count = min(FILL_CHUNK, tokens - start)
        cache.begin([slice(0, count)] * shape.batch)
        keys, values = (random_heads(shape, shape.heads, count) for _ in range(2))
        kernels.append(keys, values, cache.layers[0], cache.new_tokens)
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


def bf16_best(shape: Shape) -> tuple[str, float]:
    """The fastest decode attention over a bf16 cache, and its time."""
    q = random_heads(shape, shape.heads * shape.group, 1)
    k, v = (random_heads(shape, shape.heads, shape.tokens) for _ in range(2))
    expected = torch.stack([gate.attention(*one, shape.head_dim**-0.5) for one in zip(q, k, v, strict=True)])
    found: dict[str, float] = {}
    for name, backend in (("cuDNN", SDPBackend.CUDNN_ATTENTION), ("flash", SDPBackend.FLASH_ATTENTION)):
        with sdpa_kernel(backend):
            work = functools.partial(F.scaled_dot_product_attention, q, k, v, enable_gqa=True)
            gate.check(f"bf16 {name}", work(), expected)
            found[name] = microseconds(work)
    programs = torch.cuda.get_device_properties(DEVICE).multi_processor_count
    for waves, shape_of_tile in itertools.product((2, 4, 8), ((64, 4, 3), (128, 4, 2), (128, 8, 3))):
        splits = max(1, programs * waves // (shape.batch * shape.heads))
        work = functools.partial(bf16_decode, q, k, v, splits, *shape_of_tile)
        gate.check("bf16 Triton", work(), expected)
        taken = microseconds(work, 10)
        found["Triton"] = min(taken, found.get("Triton", taken))
    print(f"bf16, {shape}: " + ", ".join(f"{name} {taken:.1f} us" for name, taken in found.items()), flush=True)
    return min(found.items(), key=lambda pair: pair[1])


def decode_rows() -> Iterator[Callable[[], Row]]:
    for shape, packings in DECODED.items():
        name, baseline = bf16_best(shape)
        for packing in packings:
            yield functools.partial(decode_row, shape, packing, name, baseline)


def full_cache(shape: Shape, packing: Packing) -> tuple[Cache, LayerKernels, LayerCache]:
    """A packed cache full of tokens, of which `begin` was called for the last one of each sequence."""
    axis, block, bits = packing
    cache, kernels, store = packed_cache(shape, layer_plan(shape, bits, axis, block))
    fill(cache, shape, shape.tokens - 1)
    cache.begin([slice(0, 1)] * shape.batch)
    kernels.append(*(random_heads(shape, shape.heads, 1) for _ in range(2)), store, cache.new_tokens)
    return cache, kernels, store


def decode_work(shape: Shape, cache: Cache, kernels: LayerKernels, store: LayerCache) -> Callable[[], object]:
    """The attention of one token of each sequence, after it was compared."""
    q, state = random_heads(shape, shape.heads * shape.group, 1), cache.state
    assert state is not None
    scale = shape.head_dim**-0.5

    def work() -> Tensor:
        return kernels.decode(q, shape.head_dim, store, state, scale, None)

    gate.check_decode(f"decode at {store.bits} bits, {shape}", work(), q, store, scale)
    return work


def decode_row(shape: Shape, packing: Packing, name: str, baseline: float) -> Row:
    axis, block, bits = packing
    cache, kernels, store = full_cache(shape, packing)
    taken = microseconds(decode_work(shape, cache, kernels, store))
    packed = shape.batch * shape.heads * store.live_blocks(0) * block_bytes(store.plan, *bits)
    ideal = 4 * shape.batch * shape.heads * shape.tokens * shape.head_dim / packed
    what = f"K {bits[0]} V {bits[1]}, {axis} {block}"
    speed = packed / taken / 1e3
    return Row("decode", str(shape), what, taken, speed, f"bf16 {name}", baseline, baseline / taken, ideal)


def append_rows() -> Iterator[Callable[[], Row]]:
    """A token that fits in the window, and one that makes it flush a block, against the attention of the step."""
    for _, _, bits in CHANNEL_64[1:]:
        layer = layer_plan(LARGE, bits, "channel", 64)
        cache, _, _ = packed_cache(LARGE, layer)
        rows = layer.sink + layer.window
        full = rows + (LARGE.tokens - 2 * layer.block - rows) // layer.block * layer.block
        for what, tokens in (("with flush", full), ("without flush", full + 1)):
            fill(cache, LARGE, tokens)
            yield functools.partial(append_row, f"{what}, K {bits[0]} V {bits[1]}", cache)


def append_row(what: str, cache: Cache) -> Row:
    """One token appended to every sequence. The cache's counts are as before afterwards."""
    (kernels,), (store,) = cache.attention, cache.layers
    assert isinstance(kernels, LayerKernels)
    cache.begin([slice(0, 1)] * LARGE.batch)
    k, v = (random_heads(LARGE, LARGE.heads, 1) for _ in range(2))
    counts, twin = store.counts, store.copy_on(DEVICE)

    def work() -> None:
        store.go_back(counts)
        kernels.append(k, v, store, cache.new_tokens)

    work()
    for sequence, (keys, values) in enumerate(zip(k, v, strict=True)):
        twin.append(sequence, keys, values)
    gate.check_stored(f"append {what}", store, twin)
    del twin
    attention = microseconds(decode_work(LARGE, cache, kernels, store))
    taken = microseconds(work)
    store.go_back(counts)
    store.overwritten = False
    return Row("append", str(LARGE), what, taken, 0.0, "decode", attention, attention / taken, 20.0)


def lower_rows() -> Iterator[Callable[[], Row]]:
    """A gigabyte of codes lowered in place: bytes read and written a second, against those of a copy."""
    source = torch.randint(-128, 128, (1 << 30,), dtype=torch.int8, device=DEVICE)
    target = torch.empty_like(source)
    copy = max(
        2 * source.nbytes / taken / 1e3 for taken in (microseconds(lambda: target.copy_(source)), eager(target, source))
    )
    for wide, narrow in (((16, 16), (8, 8)), ((8, 8), (4, 4)), ((4, 4), (2, 2)), ((4, 4), (4, 2))):
        yield functools.partial(lower_row, wide, narrow, copy)


def eager(target: Tensor, source: Tensor) -> float:
    """Microseconds of a copy by a kernel. In a graph a copy is a memcpy, which is slower on some devices."""
    return seconds_and_peak(lambda: torch.bitwise_not(source, out=target))[0]


def lower_row(wide: tuple[int, int], narrow: tuple[int, int], copy: float) -> Row:
    tokens = 2**30 * 8 // (32 * 4 * 128 * (wide[0] + wide[1]))
    shape = Shape(32, tokens // 64 * 64 + 132)
    layer = layer_plan(shape, narrow, "channel", 64, (wide, narrow))
    cache, kernels, store = packed_cache(shape, layer)
    fill(cache, shape, shape.tokens)
    cache.begin([slice(0, 0)] * shape.batch)
    live, sizes = store.live_blocks(0), [block_bytes(layer, *bits) for bits in (wide, narrow)]
    moved = live * shape.batch * shape.heads * sum(sizes)
    counts = store.counts

    def work() -> None:
        store.go_back(counts)
        kernels.lower(store, cache.state)

    twin = store.copy_on(DEVICE)
    work()
    twin.lower()
    gate.check_stored(f"lowering {wide} to {narrow}", store, twin)
    del twin
    taken = microseconds(work, 10)
    speed = moved / taken / 1e3
    launches = f"{len(list(lowering_order(live, *sizes)))} launches"
    return Row("lower", launches, f"{wide} to {narrow}", taken, speed, "copy", moved / copy / 1e3, speed / copy, 1.0)


def prefill_rows() -> Iterator[Callable[[], Row]]:
    """A prompt of 32,768 tokens, quantized as it is read, against the library's attention over all of it at once."""
    q = random_heads(SINGLE, SINGLE.heads * SINGLE.group, SINGLE.tokens)
    k, v = (random_heads(SINGLE, SINGLE.heads, SINGLE.tokens) for _ in range(2))
    found = {}
    for name, backend in (("flash", SDPBackend.FLASH_ATTENTION), ("cuDNN", SDPBackend.CUDNN_ATTENTION)):
        with sdpa_kernel(backend):
            found[name] = seconds_and_peak(
                lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            )
        print(f"bf16 prefill, {name}: {found[name][0]:.0f} us, {found[name][1] >> 20} MiB", flush=True)
    best = min(found, key=lambda name: found[name][0])
    for bits in PREFILLED:
        for chunk in CHUNKS:
            yield functools.partial(prefill_row, q, k, v, bits, chunk, best, *found[best])


def prompt_work(
    cache: Cache, q: Tensor, k: Tensor, v: Tensor, chunk: int
) -> tuple[Callable[[], None], Callable[[], None]]:
    """Work that feeds the whole prompt in chunks to an empty cache of one layer; and the same with every chunk
    compared."""
    scale, (store,) = q.shape[-1] ** -0.5, cache.layers

    def prompt(checked: bool = False) -> None:
        cache.reset()
        for start in range(0, q.shape[2], chunk):
            part = [one[:, :, start : start + chunk] for one in (q, k, v)]
            cache.begin([slice(0, chunk)])
            attend = functools.partial(cached_attention, *part, cache, 0, scale)
            if checked:
                gate.check_chunk(f"prefill at {store.plan.stages[-1]} bits from {start:,}", attend, *part, store, scale)
            else:
                attend()
            cache.end()

    return prompt, functools.partial(prompt, checked=True)


def prefill_row(
    q: Tensor, k: Tensor, v: Tensor, bits: tuple[int, int], chunk: int, name: str, baseline: float, peak: int
) -> Row:
    layer = layer_plan(SINGLE, bits, "channel", 64)
    cache, _, _ = packed_cache(SINGLE, layer)
    work, compared = prompt_work(cache, q, k, v, chunk)
    compared()
    taken, own = seconds_and_peak(work)
    ours, theirs = (own + cache.bytes_reserved) >> 20, (peak + k.nbytes + v.nbytes) >> 20
    what = f"K {bits[0]} V {bits[1]}, chunks of {chunk:,}; peak {ours} MiB, bf16 {theirs}"
    return Row("prefill", str(SINGLE), what, taken, 0.0, f"bf16 {name}", baseline, baseline / taken, 1.0)


def seconds_and_peak(work: Callable[[], object], repeats: int = 5) -> tuple[float, int]:
    """Median microseconds of the device, and the most bytes allocated at a time, beyond those before.

    The device sleeps until the host has launched everything, as other kernels keep it busy in a model.
    """
    work()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(CYCLES_ASLEEP)
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
    head = f"| {torch.cuda.get_device_name()} | shape | what | us | GB/s | baseline, us | ratio | ideal |"
    table = [head, "| --- | --- | --- | ---: | ---: | --- | ---: | ---: |", *map(line, rows)]
    (folder / "kernels.md").write_text("\n".join(table) + "\n", encoding="utf-8")
    plot([row for row in rows if row.kernel == "decode"], folder / "kernels.svg")


def plot(rows: list[Row], path: Path) -> None:
    """Draw decode attention: how many times as fast as over bf16, beside what the fewer bytes would allow."""
    import matplotlib.pyplot as plt

    if not rows:
        return
    figure, axes = plt.subplots(figsize=(7, 0.28 * len(rows) + 1.2), layout="constrained")
    labels = [f"{row.shape.split(',')[0]}, {row.what}" for row in rows]
    axes.barh(labels, [row.ideal for row in rows], color="#d8dee9", label="fewer bytes at the same speed")
    axes.barh(labels, [row.ratio for row in rows], color="#3b6ea5", height=0.5, label="measured")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.invert_yaxis()
    axes.set_xlabel(f"times as fast as the best attention over bf16, {torch.cuda.get_device_name()}")
    axes.legend()
    figure.savefig(path)
    plt.close(figure)


if __name__ == "__main__":
    main()
