"""Checks of the generated kernels against attention in float64 over the numbers that the cache's codes stand for.

They run on a GPU, and anywhere in Triton's interpreter, for which Triton must be imported with TRITON_INTERPRET=1:

    TRITON_INTERPRET=1 python -m tests.kernel_checks
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import triton.language as tl
from triton.runtime import interpreter

from pmkvq_compiler.emit.kernel_source import kernel_source, tuning_table
from pmkvq_compiler.runtime import prefill
from pmkvq_compiler.runtime.attention import cached_attention
from pmkvq_compiler.runtime.cache import Cache
from pmkvq_compiler.runtime.kernels import LayerKernels
from pmkvq_compiler.runtime.plan import CODE_BITS, LayerPlan, block_bytes, sequence_bytes
from pmkvq_compiler.runtime.tuning import DEFAULT_TUNING, Tuning, read_tunings

from . import fuzz
from .runtime.plans import cache_plan, layer_plan
from .runtime.test_attention import reference, stored_numbers

CONSERVATIVE = read_tunings(tuning_table())[DEFAULT_TUNING]

LIBRARY = dataclasses.replace(CONSERVATIVE, library_unit=64, prefill_scratch=1 << 16)
"""The library reads the history of prompts of 64 tokens or more, few blocks at a time."""

TOLERANCE = 2e-3
"""Relative norm of the error, for inputs in fp16 or bf16."""

INTERPRETED_BFLOAT16 = 6e-3
"""The interpreter cuts numbers to bf16 where the device rounds them."""

LONG = 512
"""Tokens of a call up to which each is compared; scores in float64 of a longer one would fill the host's memory."""

SAMPLE = 64
"""Tokens of a longer call that are compared."""


@dataclass(frozen=True)
class Case:
    """A layer, and the lengths of the calls that feed it: (columns, own tokens of every sequence)."""

    head_dim: int = 64
    group: int = 2
    key_bits: int = 4
    value_bits: int = 2
    key_axis: str = "channel"
    block: int = 64
    sink: int = 4
    window: int = 64
    heads: int = 1
    sliding_window: int | None = None
    chunked: bool = False
    softcap: float | None = None
    has_sinks: bool = False
    dtype: torch.dtype = torch.float16
    max_len: int = 420
    steps: tuple[tuple[slice, ...], ...] = ()
    direct: bool = False
    taken_back: int = 0
    """Tokens that every sequence loses again before the last call."""
    tuning: Tuning = CONSERVATIVE

    def plan(self) -> LayerPlan:
        values = {name: getattr(self, name) for name in ("key_bits", "value_bits", "key_axis", "block", "sink")}
        values |= {"window": self.window, "sliding_window": self.sliding_window, "num_key_value_heads": self.heads}
        values |= {"chunked": self.chunked}
        values |= {"key_head_dim": self.head_dim, "value_head_dim": self.head_dim}
        if self.direct:
            values["stages"] = ((self.key_bits, self.value_bits),)
        return layer_plan(self.max_len, len(self.steps[0]) if self.steps else 1, self.dtype.itemsize, **values)


def render_module(case: Case, paged: bool = False) -> ModuleType:
    text = kernel_source(case.plan(), case.group, case.softcap, case.has_sinks, "a layer", paged)
    name = f"kernels_{abs(hash(text)):x}"
    if name not in sys.modules:
        path = Path(tempfile.mkdtemp()) / f"{name}.py"
        path.write_text(text)
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


@contextmanager
def poisoned() -> Iterator[None]:
    """Every tensor that is made without numbers holds NaNs: one that is read without having been written shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(1).isnan(), "torch.utils.deterministic.fill_uninitialized_memory is on"
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@poisoned()
def run_case(case: Case, device: torch.device, seed: int = 0) -> list[float]:
    """Feed the case's calls; the relative error of every call's output. What is stored equals the reference's cache."""
    generator = torch.Generator().manual_seed(seed)
    plan = case.plan()
    batch = len(case.steps[0])
    whole = cache_plan(plan, max_len=case.max_len, batch_size=batch)
    kernels = [LayerKernels(render_module(case), case.tuning)]
    cache = Cache(whole, batch, None, case.dtype, device, kernels)
    twin = Cache(whole, batch, None, case.dtype, torch.device("cpu"))
    cache.layers[0].arena.fill_(0xFF)  # NaN in every format: a number that is read without having been written shows

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    offset = 2 * draw(case.head_dim)
    sinks = draw(case.heads * case.group).to(case.dtype) if case.has_sinks else None
    errors = []
    for number, own in enumerate(case.steps, 1):
        if number == len(case.steps):
            for one in (cache, twin):
                take_back(one, case.taken_back)
        columns = max(part.stop for part in own)
        q = draw(batch, case.heads * case.group, columns, case.head_dim).to(case.dtype)
        k = (draw(batch, case.heads, columns, case.head_dim) + offset).to(case.dtype)
        v = draw(batch, case.heads, columns, case.head_dim).to(case.dtype)
        k[0, :, 68:136] *= 1e-5  # a block whose keys are the same, but for less than fp16 holds
        k[0, :, 132:200], v[0, :, 132:200] = 0, 0
        before = [stored_numbers(copy_to_cpu(cache).layers[0], b) for b in range(batch)]
        for one in (cache, twin):
            one.begin(list(own))
        args: list[Any] = [tensor.to(device) for tensor in (q, k, v)]
        scale = case.head_dim**-0.5
        out = cached_attention(*args, cache, 0, scale, case.softcap, sinks if sinks is None else sinks.to(device)).cpu()
        for b, part in enumerate(own):
            twin.layers[0].append(b, k[b, :, part], v[b, :, part])
        compare_stores(copy_to_cpu(cache), twin)
        after = copy_to_cpu(cache)
        error = total = 0.0
        for b, part in enumerate(own):
            count = part.stop - part.start
            if not count:
                continue
            assert out[b, :, part].isfinite().all()
            chosen = compared(count, generator)
            positions = cache.length[b] + torch.arange(count)
            if columns == 1:
                keys, values, at = stored_numbers(after.layers[0], b)
            else:
                keys, values = (
                    torch.cat([old, new[b, :, part].double()], 1)
                    for old, new in zip(before[b][:2], (k, v), strict=True)
                )
                at = torch.cat([before[b][2], positions])
            own_positions = positions[chosen].unsqueeze(-1)
            visible = at <= own_positions
            if case.sliding_window is not None:
                visible &= at >= plan.first_seen(own_positions)
            expected = reference(q[b, :, part][:, chosen], keys, values, visible, scale, case.softcap, sinks)
            error += (out[b, :, part][:, chosen].double() - expected).square().sum().item()
            total += expected.square().sum().item()
        for one in (cache, twin):
            one.end()
        errors.append((error / total) ** 0.5)
    assert cache.layers[0].bits == twin.layers[0].bits
    return errors


def compared(count: int, generator: torch.Generator) -> torch.Tensor:
    """Which tokens of a call are compared: all of a short one, some and the last of a long one."""
    if count <= LONG:
        return torch.arange(count)
    some = torch.randperm(count - 1, generator=generator)[: SAMPLE - 1]
    return torch.cat([some, torch.tensor([count - 1])])


def check_lowering(wide: int, device: torch.device) -> None:
    """Blocks of every code of `wide` bits, lowered in place, are those of the reference to the last bit."""
    case = Case(key_bits=wide // 2, value_bits=wide // 2, steps=steps(1))
    stages = ((wide, wide), (wide // 2, wide // 2))
    max_len = case.sink + case.window + 8 * case.block
    plan = dataclasses.replace(case.plan(), stages=stages)
    plan = dataclasses.replace(plan, arena_bytes=sequence_bytes(plan, max_len, 2, stage=0))
    kernels = LayerKernels(render_module(case), CONSERVATIVE)
    cache, twin = (
        Cache(cache_plan(plan, max_len=max_len), 1, None, case.dtype, where, chosen)
        for where, chosen in ((device, [kernels]), (torch.device("cpu"), None))
    )
    for one in (cache, twin):
        one.layers[0].seek([max_len])
        one.length = [max_len]
    words = torch.randperm(1 << 16, generator=torch.Generator().manual_seed(wide)).to(torch.int16)
    twin.layers[0].arena.random_(generator=torch.Generator().manual_seed(0))
    records = twin.layers[0].records(0, 0, 8)
    for codes, chosen in zip((records.key_codes, records.value_codes), words.chunk(2), strict=True):
        codes.view(torch.int16).copy_(chosen[: codes.numel() // 2].view((*codes.shape[:-1], -1)))
    cache.layers[0].arena.copy_(twin.layers[0].arena)
    cache.begin([slice(0, 0)])
    kernels.lower(cache.layers[0], cache.state)
    twin.layers[0].lower()
    used = slice(0, twin.layers[0].arena.shape[-1] - twin.layers[0].pool.shape[-1] + 8 * block_bytes(plan, *stages[1]))
    assert torch.equal(cache.layers[0].arena[..., used].cpu(), twin.layers[0].arena[..., used])


def check_sharing(device: torch.device) -> None:
    """A second layer that reads a layer's cache gets what it would get from a cache of its own."""
    case = Case(sliding_window=150, sink=0, steps=steps(120, 1, 70, 1, 1))
    kernels = [LayerKernels(render_module(case), case.tuning)]
    whole = cache_plan(case.plan(), max_len=case.max_len)
    shared, own = (Cache(whole, 1, None, case.dtype, device, kernels) for _ in range(2))
    generator = torch.Generator().manual_seed(0)
    for (columns,) in case.steps:
        first, q, k, v = (
            torch.randn(1, heads, columns.stop, case.head_dim, generator=generator).to(device, case.dtype)
            for heads in (2, 2, 1, 1)
        )
        for cache in (shared, own):
            cache.begin([columns])
        cached_attention(first, k, v, shared, 0, 0.125, shared=True)
        assert torch.equal(cached_attention(q, None, None, shared, 0, 0.125), cached_attention(q, k, v, own, 0, 0.125))
        for cache in (shared, own):
            cache.end()
        compare_stores(copy_to_cpu(shared), copy_to_cpu(own))


def take_back(cache: Cache, count: int) -> None:
    """Take the last tokens of every sequence out of its window again."""
    cache.length = [length - count for length in cache.length]
    for layer in cache.layers:
        layer.crop(count)


def copy_to_cpu(cache: Cache) -> Cache:
    """The same cache for the reference path."""
    store, cpu = cache.layers[0], torch.device("cpu")
    plan = cache_plan(store.plan, max_len=cache.max_len, batch_size=cache.batch_size)
    copy = Cache(plan, cache.batch_size, cache.max_len, store.keys.dtype, cpu)
    copy.layers[0] = store.copy_on(cpu)
    return copy


def compare_stores(cache: Cache, twin: Cache) -> None:
    """Rows, parameters and codes are the same to the last bit."""
    one, other = cache.layers[0], twin.layers[0]
    assert one.counts == other.counts
    for b, rows in enumerate(one.rows):
        assert torch.equal(one.keys[b, :, :rows], other.keys[b, :, :rows])
        assert torch.equal(one.values[b, :, :rows], other.values[b, :, :rows])
        ours, theirs = (store.records(b, 0, store.live_blocks(b)) for store in (one, other))
        for name in ("key_parameters", "value_parameters", "key_codes", "value_codes"):
            assert torch.equal(getattr(ours, name), getattr(theirs, name)), f"{name} differ"


def steps(*counts: int, batch: int = 1) -> tuple[tuple[slice, ...], ...]:
    return tuple((slice(0, count),) * batch for count in counts)


RAGGED = (
    (slice(0, 200), slice(150, 200), slice(0, 1)),
    (slice(0, 1), slice(0, 0), slice(0, 1)),
    (slice(0, 3), slice(0, 100), slice(0, 0)),
    *(((slice(0, 1),) * 3,) * 2),
)

RAGGED_HISTORY = (
    (slice(60, 200), slice(150, 200), slice(0, 140), slice(9, 200)),
    (slice(0, 1), slice(0, 0), slice(0, 1), slice(0, 1)),
    (slice(70, 100), slice(30, 100), slice(0, 0), slice(0, 100)),
    ((slice(0, 1),) * 4),
)
"""The second call of many tokens meets sequences with many blocks and with none, one that brings few, and at last one
whose history is whole pieces with sink and window: then the new tokens are added while its parts are put together."""

SMALL = [
    Case(steps=steps(1, 67, 1, 150, 1, 1)),
    Case(key_axis="token", key_bits=2, value_bits=4, group=7, steps=steps(300, 1, 60, 1)),
    Case(head_dim=80, group=3, key_bits=2, value_bits=2, block=128, window=128, steps=steps(280, 1)),
    Case(head_dim=96, key_axis="token", key_bits=8, value_bits=16, dtype=torch.bfloat16, steps=steps(200, 1)),
    Case(head_dim=128, group=1, key_bits=16, value_bits=8, window=100, steps=steps(240, 1)),
    Case(sliding_window=230, window=128, steps=steps(200, 1, 170, 40)),
    Case(sliding_window=150, sink=0, softcap=5.0, has_sinks=True, steps=steps(60, 1, 250, 1, 64, 1)),
    Case(sliding_window=130, sink=0, chunked=True, steps=steps(60, 1, 250, 1, 64, 1)),
    Case(steps=RAGGED),
    Case(dtype=torch.float32, head_dim=80, key_bits=2, steps=steps(150, 70)),
    Case(steps=steps(196, 90), taken_back=64),
    Case(steps=RAGGED_HISTORY, group=2, has_sinks=True, tuning=LIBRARY),
]

if os.environ.get(fuzz.LONG):
    SMALL += [
        Case(steps=RAGGED_HISTORY, heads=2, group=2, has_sinks=True, tuning=LIBRARY),
        Case(steps=RAGGED, heads=2, tuning=dataclasses.replace(CONSERVATIVE, prefill_scratch=1 << 18)),
        Case(steps=steps(196, 1), taken_back=64),
    ]


def repair_interpreter() -> None:
    """Let the interpreter of Triton 3.6 take loop bounds from one-element arrays, which NumPy 2.4 refuses, and keep it
    from what only costs time: it searches all of `triton.language` at each call of a function within a kernel, which
    has patched it, and computes whether integers overflow, but tells nobody."""
    patch_tensor, patch_language = interpreter._patch_lang_tensor, interpreter._patch_lang

    def patch(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    @functools.cache
    def languages(function: Any) -> list[ModuleType]:
        return [value for value in function.__globals__.values() if value is tl or value is tl.core]

    def patch_once(function: Any) -> Any:
        if any(tl.core.is_builtin(language.load) for language in languages(function)):
            return patch_language(function)
        return interpreter._LangPatchScope()

    interpreter._patch_lang_tensor = patch
    interpreter._patch_lang = patch_once
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)


def second_first(device: torch.device, first: Callable[[], Any], second: Callable[[], Any]) -> tuple[Any, Any]:
    """`side_by_side` where the second one's work has been done before the first one's begins, as may be on a device."""
    other = second()
    return first(), other


if __name__ == "__main__":
    repair_interpreter()
    prefill.side_by_side = second_first
    torch.set_num_threads(1)
    for number, case in enumerate(SMALL):
        found = run_case(case, torch.device("cpu"))
        tolerance = INTERPRETED_BFLOAT16 if case.dtype == torch.bfloat16 else TOLERANCE
        assert max(found) < tolerance, f"case {number}: errors {found}"
        print(f"case {number}: {max(found):.1e}", flush=True)
    check_sharing(torch.device("cpu"))
    for wide in CODE_BITS[:-1]:
        check_lowering(wide, torch.device("cpu"))
