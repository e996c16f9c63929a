"""Find the fastest launch parameters of the kernels on this CUDA device, and write them into a table of tunings.

    python examples/benchmarks/tune.py --name H200 templates/kernels/tuning.json     # what new artifacts carry
    python examples/benchmarks/tune.py --name H200 ARTIFACT/PACKAGE/kernels/tuning.json

Candidates are compiled by many processes and then timed one at a time: decode attention at the benchmark's largest
shape for every width, and prefill of 32,768 tokens in chunks of 8,192. What they compute is compared first (`gate.py`).
The fastest are written under --name, a part of the device's name. After you change the table of an artifact, put its
new sha256 into pmkvq.json, or compile again.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import math
import multiprocessing
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TypeVar

import torch
from gate import WrongKernelError
from kernel_times import (
    DEVICE,
    LARGE,
    SINGLE,
    decode_work,
    full_cache,
    layer_plan,
    microseconds,
    packed_cache,
    prompt_work,
    random_heads,
    seconds_and_peak,
)

from pmkvq_compiler.runtime.cache import Cache
from pmkvq_compiler.runtime.kernels import LayerKernels
from pmkvq_compiler.runtime.layer_cache import LayerCache
from pmkvq_compiler.runtime.plan import CODE_BITS, FINAL_BITS
from pmkvq_compiler.runtime.tuning import DEFAULT_TUNING, DecodeTuning, Tuning, read_tunings

C = TypeVar("C")
CHUNK = 8192
PREFILL_SHAPES = ((64, 64, 4, 3), (128, 64, 8, 3), (128, 128, 8, 2), (128, 64, 8, 2))
"""Queries and keys of a step, warps, stages."""
UNITS = (0, 1024)
"""Without the library's attention, and with it from so many new tokens on."""


def decode_candidates(bits: int) -> list[DecodeTuning]:
    cells, registers = (1, (168, 184, 200)) if bits == 2 else (2, (168, 200, 224, 248))
    return [DecodeTuning(cells, *values) for values in itertools.product(registers, (0, 1, 2))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", type=Path, help="tuning.json to change")
    parser.add_argument("--name", required=True, help="part of the device's name")
    arguments = parser.parse_args()
    tunings = read_tunings(arguments.table.read_text(encoding="utf-8"))
    default = tunings[DEFAULT_TUNING]
    jobs = [functools.partial(decode_time, bits, one) for bits in FINAL_BITS for one in decode_candidates(bits)]
    jobs += [functools.partial(prefill_time, default, *shape) for shape in PREFILL_SHAPES]
    compile_all(jobs)
    decode = {bits: fastest(decode_candidates(bits), functools.partial(decode_time, bits)) for bits in FINAL_BITS}
    decode[CODE_BITS[0]] = decode[FINAL_BITS[0]]
    tile, step, warps, stages = fastest(PREFILL_SHAPES, lambda shape: prefill_time(default, *shape))
    found = dataclasses.replace(
        default, decode=decode, prefill_tile=tile, prefill_step=step, prefill_warps=warps, prefill_stages=stages
    )
    unit = fastest(UNITS, lambda unit: prefill_time(found, tile, step, warps, stages, unit))
    found = dataclasses.replace(found, library_unit=unit)
    table = {name: dataclasses.asdict(tuning) for name, tuning in (tunings | {arguments.name: found}).items()}
    arguments.table.write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(table[arguments.name], indent=2))


def fastest(candidates: Sequence[C], time: Callable[[C], float]) -> C:
    """The candidate that takes the least time; a wrong one takes forever. Exits where all are wrong."""
    times = [time(candidate) for candidate in candidates]
    best = min(times)
    if best == math.inf:
        sys.exit("every candidate computes something wrong; the table was not changed")
    return candidates[times.index(best)]


def compile_all(jobs: list[functools.partial[float]]) -> None:
    """Run every job once, in parallel processes, so that Triton has its kernels in its cache."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(12, os.cpu_count() or 1), mp_context=context) as pool:
        for _ in pool.map(run_quietly, jobs):
            pass


def run_quietly(job: functools.partial[float]) -> None:
    job(quiet=True)


@functools.lru_cache(maxsize=1)
def decode_cache(bits: int) -> tuple[Cache, LayerKernels, LayerCache]:
    return full_cache(LARGE, ("channel", 64, (bits, bits)))


def decode_time(bits: int, candidate: DecodeTuning, quiet: bool = False) -> float:
    cache, kernels, store = decode_cache(bits)
    tuning = dataclasses.replace(kernels.tuning, decode=dict.fromkeys(CODE_BITS, candidate))
    tuned = LayerKernels(kernels.module, tuning)
    try:
        work = decode_work(LARGE, cache, tuned, store)
    except WrongKernelError as error:
        print(f"{candidate}: {error}", flush=True)
        return math.inf
    taken = microseconds(work, 1 if quiet else 15)
    if not quiet:
        print(f"decode, {bits} bits, {candidate}: {taken:.1f} us", flush=True)
    return taken


def prefill_time(
    default: Tuning, tile: int, step: int, warps: int, stages: int, unit: int = 0, quiet: bool = False
) -> float:
    tuning = dataclasses.replace(
        default,
        prefill_tile=tile,
        prefill_step=step,
        prefill_warps=warps,
        prefill_stages=stages,
        library_unit=unit,
    )
    name = f"prefill, tiles of {tile} x {step}, {warps} warps, {stages} stages, the library from {unit} tokens on"
    cache, kernels, _ = packed_cache(SINGLE, layer_plan(SINGLE, (4, 4), "channel", 64))
    cache.attend_by([LayerKernels(kernels.module, tuning)])
    q, k, v = (random_heads(SINGLE, heads, SINGLE.tokens) for heads in (SINGLE.heads * SINGLE.group, 4, 4))
    work, compared = prompt_work(cache, q, k, v, CHUNK)
    try:
        compared()
    except WrongKernelError as error:
        print(f"{name}: {error}", flush=True)
        return math.inf
    taken, _ = seconds_and_peak(work, 1 if quiet else 3)
    if not quiet:
        print(f"{name}: {taken:.0f} us", flush=True)
    return taken


if __name__ == "__main__":
    assert DEVICE.type == "cuda"
    torch.manual_seed(0)
    main()
