"""The gate of the benchmarks: a kernel that is wrong gets no time."""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from pmkvq_compiler.runtime.attention import cached_attention
from pmkvq_compiler.runtime.cache import Cache

from .runtime.plans import cache_plan, layer_plan

BENCHMARKS = Path(__file__).parent.parent / "examples" / "benchmarks"
SCALE = 0.125


@pytest.fixture(name="gate")
def imported_gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(BENCHMARKS)
    yield importlib.import_module("gate")
    del sys.modules["gate"]


@pytest.fixture(name="cache")
def filled_cache() -> Cache:
    """One layer of 3 KV heads of 64 channels, two sequences of 200 tokens."""
    torch.manual_seed(0)
    plan = layer_plan(max_len=300, batch_size=2, window=64, block=64)
    cache = Cache(cache_plan(plan, max_len=300, batch_size=2), 2, None, torch.float32, torch.device("cpu"))
    attend(cache, 200)
    return cache


def attend(cache: Cache, count: int) -> tuple[Tensor, Tensor]:
    """Queries of new random tokens [B, 6, count, 64], and their attention; the tokens are in the cache then."""
    batch = cache.batch_size
    q, k, v = (torch.randn(batch, heads, count, 64) for heads in (6, 3, 3))
    cache.begin([slice(0, count)] * batch)
    out = cached_attention(q, k, v, cache, 0, SCALE)
    cache.end()
    return q, out


def test_a_wrong_or_missing_number_is_refused_and_rounding_is_not(gate: ModuleType) -> None:
    expected = torch.randn(4, 100)
    gate.check("this", expected.bfloat16(), expected)
    for wrong in (float("nan"), float("inf"), 10.0):
        found = expected.clone()
        found[2, 7] = wrong
        with pytest.raises(gate.WrongKernelError, match=r"this is wrong: its relative error is .*4.0e-03 is allowed"):
            gate.check("this", found, expected)


def test_decode_over_the_stored_codes_passes_and_over_others_does_not(gate: ModuleType, cache: Cache) -> None:
    q, out = attend(cache, 1)
    store = cache.layers[0]
    gate.check_decode("decode", out, q, store, SCALE)
    records = store.records(1, 0, 1)
    records.value_codes.bitwise_xor_(0x55)
    with pytest.raises(gate.WrongKernelError, match="decode is wrong"):
        gate.check_decode("decode", out, q, store, SCALE)


def test_a_token_that_was_begun_and_not_appended_is_missed(gate: ModuleType, cache: Cache) -> None:
    q, out = attend(cache, 1)
    store = cache.layers[0]
    counts = store.counts
    store.go_back(type(counts)([rows - 1 for rows in counts.rows], counts.flushed, counts.stage))
    with pytest.raises(gate.WrongKernelError, match="decode is wrong"):
        gate.check_decode("decode", out, q, store, SCALE)


@pytest.mark.parametrize("wrong", [False, True])
def test_every_chunk_of_a_prompt_is_compared(gate: ModuleType, wrong: bool) -> None:
    torch.manual_seed(0)
    cache = Cache(cache_plan(layer_plan(300, 1), max_len=300), 1, None, torch.float32, torch.device("cpu"))
    q, k, v = (torch.randn(1, heads, 90, 64) for heads in (6, 3, 3))
    for turn in range(3):
        cache.begin([slice(0, 90)])

        def chunk(late: float = 1.0 if wrong and turn == 2 else 0.0) -> Tensor:
            return cached_attention(q, k, v, cache, 0, SCALE) + late

        if wrong and turn == 2:
            with pytest.raises(gate.WrongKernelError, match="the chunk is wrong"):
                gate.check_chunk("the chunk", chunk, q, k, v, cache.layers[0], SCALE)
        else:
            gate.check_chunk("the chunk", chunk, q, k, v, cache.layers[0], SCALE)
        cache.end()


def test_stored_bits_are_compared_with_those_of_the_reference_path(gate: ModuleType, cache: Cache) -> None:
    store = cache.layers[0]
    twin = store.copy_on(torch.device("cpu"))
    gate.check_stored("append", store, twin)
    twin.records(0, 0, 1).key_codes[0, 0, 3] ^= 1
    with pytest.raises(gate.WrongKernelError, match="append is wrong: it does not store the bits"):
        gate.check_stored("append", store, twin)
