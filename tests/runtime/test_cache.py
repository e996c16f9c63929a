"""The cache stays inside its bytes, lowers its layers in the planned order, and refuses before it changes."""

import dataclasses
import itertools

import pytest
import torch

from pmkvq_compiler.runtime.attention import cached_attention
from pmkvq_compiler.runtime.cache import Cache
from pmkvq_compiler.runtime.errors import CacheFull, InputError
from pmkvq_compiler.runtime.layer_cache import LayerCache
from pmkvq_compiler.runtime.plan import FINAL_BITS, CachePlan, LayerPlan, blocks_needed, longest

from .plans import cache_plan, layer_plan, stages_to

CPU = torch.device("cpu")


def feed(cache: Cache, count: int) -> None:
    """Append `count` random tokens to every sequence of every layer."""
    cache.begin([slice(0, count)] * cache.batch_size)
    for index, store in enumerate(cache.layers):
        plan = store.plan
        shape = (cache.batch_size, plan.num_key_value_heads, count)
        k, v = torch.randn(*shape, plan.key_head_dim), torch.randn(*shape, plan.value_head_dim)
        cached_attention(k, k, v, cache, index, 0.125)
    cache.end()


def mixed_plan(max_len: int, batch_size: int, itemsize: int = 4) -> CachePlan:
    changes: list[dict[str, object]] = [
        {"key_bits": 2, "value_bits": 2, "key_axis": "channel"},
        {"key_bits": 8, "value_bits": 2},
        {"sliding_window": 200, "sink": 0},
        {"stages": (), "key_bits": 32, "value_bits": 32, "sink": 0, "window": max_len},
    ]
    layers = [layer_plan(max_len, batch_size, itemsize, **change) for change in changes]
    return cache_plan(*layers, max_len=max_len, batch_size=batch_size)


def owned_bytes(cache: Cache) -> int:
    """Bytes of every distinct storage that the cache's objects reach."""
    tensors = [value for store in cache.layers for value in vars(store).values() if isinstance(value, torch.Tensor)]
    tensors += [value for value in vars(cache).values() if isinstance(value, torch.Tensor)]
    return sum({tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}.values())


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("max_len", [64, 333, 900])
def test_bytes_never_exceed_the_budget(batch_size: int, max_len: int) -> None:
    plan = mixed_plan(900, batch_size)
    cache = Cache(plan, batch_size, max_len, torch.float32, CPU)
    reserved = cache.bytes_reserved
    assert owned_bytes(cache) == reserved <= plan.budget
    while cache.length[0] < max_len:
        feed(cache, min(37, max_len - cache.length[0]))
        assert owned_bytes(cache) == cache.bytes_reserved == reserved
        assert cache.bytes_used <= reserved


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_batch_sizes_share_the_same_bytes(dtype: torch.dtype) -> None:
    plan = mixed_plan(900, 2, itemsize=2)
    for batch_size in (1, 2, 3, 5):
        cache = Cache(plan, batch_size, None, dtype, CPU)
        assert cache.bytes_reserved <= plan.budget
        assert cache.max_len == longest(plan, batch_size, dtype.itemsize) <= plan.max_len
        feed(cache, cache.max_len)
        with pytest.raises(CacheFull):
            feed(cache, 1)


def test_layers_are_lowered_in_the_planned_order_to_their_final_bits() -> None:
    max_len = 1500
    layers = [layer_plan(max_len, key_bits=k, value_bits=v) for k, v in itertools.product(FINAL_BITS, repeat=2)]
    cache = Cache(cache_plan(*layers, max_len=max_len), 1, None, torch.float32, CPU)
    seen: list[list[tuple[int, int]]] = [[bits] for bits in cache.bits]
    while cache.length[0] < max_len:
        feed(cache, min(1 if cache.length[0] % 3 else 20, max_len - cache.length[0]))
        for history, bits in zip(seen, cache.bits, strict=True):
            if history[-1] != bits:
                history.append(bits)
    assert [tuple(history) for history in seen] == [layer.stages for layer in layers]
    assert cache.bits == [(layer.key_bits, layer.value_bits) for layer in layers]


def test_lowered_codes_equal_codes_stored_late() -> None:
    """Blocks lowered through every width hold what they would hold had they been written at the final bits."""
    final = layer_plan(700, key_axis="channel", stages=((4, 2),))
    progressive = dataclasses.replace(final, stages=stages_to(4, 2))
    stores = [LayerCache(layer, 1, 700, torch.float32, CPU) for layer in (final, progressive)]
    keys, values = torch.randn(3, 700, 64), torch.randn(3, 700, 64)
    for start in range(0, 700, 50):
        for store in stores:
            store.append(0, keys[:, start : start + 50], values[:, start : start + 50])
    at_once, lowered = (store.records(0, 0, store.live_blocks(0)) for store in stores)
    assert stores[1].bits == (4, 2)
    assert torch.equal(at_once.key_parameters, lowered.key_parameters)
    assert torch.equal(at_once.key_codes, lowered.key_codes)
    assert torch.equal(at_once.value_codes, lowered.value_codes)


def test_full_cache_refuses_before_it_changes() -> None:
    cache = Cache(mixed_plan(300, 2), 2, None, torch.float32, CPU)
    feed(cache, 299)
    before = [store.arena.clone() for store in cache.layers]
    counts = [store.counts for store in cache.layers]
    with pytest.raises(CacheFull, match=r"299 of 300 tokens and 2 more"):
        feed(cache, 2)
    assert all(torch.equal(store.arena, arena) for store, arena in zip(cache.layers, before, strict=True))
    assert [store.counts for store in cache.layers] == counts
    assert cache.length == [299, 299]
    feed(cache, 1)


@pytest.mark.parametrize(("batch_size", "max_len"), [(1, 301), (0, None), (1, 0), (5000, None)])
def test_impossible_caches_are_refused(batch_size: int, max_len: int | None) -> None:
    with pytest.raises(InputError, match=r"batch_size|max_len"):
        Cache(mixed_plan(300, 1), batch_size, max_len, torch.float32, CPU)


@pytest.mark.parametrize("window", [64, 65, 100, 128])
@pytest.mark.parametrize("sliding_window", [None, 64, 100, 129, 1000])
def test_blocks_needed_is_what_a_run_holds(window: int, sliding_window: int | None) -> None:
    """The count that the planner pays for is reached, and is enough for all that attention may look at."""
    layer: LayerPlan = layer_plan(800, window=window, sliding_window=sliding_window, sink=0 if sliding_window else 4)
    store = LayerCache(layer, 1, 800, torch.float32, CPU)
    needed = blocks_needed(layer, 800)
    for position in range(800):
        store.append(0, torch.randn(3, 1, 64), torch.randn(3, 1, 64))
        reach = position + 1 if sliding_window is None else min(position + 1, sliding_window)
        held = set(store.positions(0).tolist())
        assert held >= set(range(position + 1 - reach, position + 1))
    assert store.live_blocks(0) == needed
