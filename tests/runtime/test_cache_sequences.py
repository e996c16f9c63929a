"""Sequences that change places, multiply, or lose their last tokens, on packed codes: as if they had always been so."""

import random
from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from pmkvq_compiler.runtime.attention import cached_attention
from pmkvq_compiler.runtime.cache import Cache
from pmkvq_compiler.runtime.errors import InputError

from .test_cache import CPU, mixed_plan

MAX_LEN = 900
Tokens = list[tuple[Tensor, Tensor]]
"""K and V [sequences, heads, count, 64] of every layer."""


def random_tokens(sequences: int, count: int, layers: int = 4) -> Tokens:
    return [(torch.randn(sequences, 3, count, 64), torch.randn(sequences, 3, count, 64)) for _ in range(layers)]


def pick(tokens: Tokens, sequences: Sequence[int]) -> Tokens:
    return [(k[list(sequences)], v[list(sequences)]) for k, v in tokens]


def columns(tokens: Tokens, start: int, stop: int) -> Tokens:
    return [(k[:, :, start:stop], v[:, :, start:stop]) for k, v in tokens]


def feed(cache: Cache, tokens: Tokens, counts: Sequence[int] | None = None) -> list[Tensor]:
    """Every layer's attention output for the same `tokens` as queries; `counts` of them where rows are padded."""
    width = tokens[0][0].shape[2]
    cache.begin([slice(width - count, width) for count in counts or [width] * cache.batch_size])
    outputs = [cached_attention(k, k, v, cache, layer, 0.125) for layer, (k, v) in enumerate(tokens)]
    cache.end()
    return outputs


def same(cache: Cache, expected: Cache, tolerance: float = 0) -> bool:
    """Whether two caches hold the same, tested by what the same new tokens see in both."""
    assert cache.bits == expected.bits
    assert cache.length == expected.length
    assert cache.bytes_used == expected.bytes_used
    tokens = random_tokens(cache.batch_size, 3)
    pairs = zip(feed(cache, tokens), feed(expected, tokens), strict=True)
    return all((one - other).norm() <= tolerance * other.norm() for one, other in pairs)


def filled(batch_size: int, tokens: Tokens, counts: Sequence[int], *, sequences: Sequence[int]) -> Cache:
    """A cache into which the last `counts` columns of `sequences` of `tokens` went, in a long call and short ones."""
    cache = Cache(mixed_plan(MAX_LEN, batch_size), len(sequences), None, torch.float32, CPU)
    width = tokens[0][0].shape[2]
    for start, stop in pairwise([0, width - 20, width - 19, width]):
        own = [min(stop - start, max(0, stop - width + counts[sequence])) for sequence in sequences]
        feed(cache, columns(pick(tokens, sequences), start, stop), own)
    return cache


@pytest.mark.parametrize("length", [50, 400, 880])
def test_reordered_sequences_are_as_if_fed_in_that_order(length: int) -> None:
    tokens, counts = random_tokens(4, length), [length, length - 7, length, length // 2]
    order = [2, 2, 0, 3]
    cache = filled(4, tokens, counts, sequences=range(4))
    arenas = [store.arena.data_ptr() for store in cache.layers]
    cache.reorder(order)
    assert [store.arena.data_ptr() for store in cache.layers] == arenas, "in place"
    assert same(cache, filled(4, tokens, counts, sequences=order))


def test_beams_that_are_reordered_after_every_token() -> None:
    generator = random.Random(5)
    history, cache = random_tokens(3, 250), Cache(mixed_plan(MAX_LEN, 3), 3, None, torch.float32, CPU)
    feed(cache, history)
    for _ in range(20):
        column = random_tokens(3, 1)
        feed(cache, column)
        history = [
            (torch.cat([k, new_k], 2), torch.cat([v, new_v], 2))
            for (k, v), (new_k, new_v) in zip(history, column, strict=True)
        ]
        order = [generator.randrange(3) for _ in range(3)]
        cache.reorder(order)
        history = pick(history, order)
    fresh = Cache(mixed_plan(MAX_LEN, 3), 3, None, torch.float32, CPU)
    feed(fresh, columns(history, 0, 250))
    for column in range(250, 270):
        feed(fresh, columns(history, column, column + 1))
    assert same(cache, fresh)


@pytest.mark.parametrize("sequences", [[1], [2, 0], [0, 0, 1, 1, 2, 2]])
@pytest.mark.parametrize("length", [50, 400, 800])
def test_selected_sequences_are_as_if_fed_alone(sequences: list[int], length: int) -> None:
    tokens, counts = random_tokens(3, length), [length, length - 40, length // 2]
    cache = Cache(mixed_plan(MAX_LEN, 6), 3, 820, torch.float32, CPU)
    feed(cache, tokens, counts)
    chosen = cache.select(sequences)
    assert chosen.bytes_reserved <= cache.plan.budget
    expected = Cache(mixed_plan(MAX_LEN, 6), len(sequences), 820, torch.float32, CPU)
    feed(expected, pick(tokens, sequences), [counts[sequence] for sequence in sequences])
    for store, chosen_store in zip(expected.layers, chosen.layers, strict=True):
        while store.stage < chosen_store.stage:  # bits that were given up do not come back with more room
            store.lower()
    assert same(chosen, expected, tolerance=1e-3)  # a code stored wide and then lowered may differ by one


def test_more_sequences_than_the_budget_holds_are_refused() -> None:
    cache = Cache(mixed_plan(MAX_LEN, 2), 2, None, torch.float32, CPU)
    feed(cache, random_tokens(2, 100))
    with pytest.raises(InputError, match=r"max_len 900 is not between 1 and \d+"):
        cache.select([0, 1, 1])
    with pytest.raises(InputError, match=r"sequences \[0, 2\] are not all among the cache's 0 to 1"):
        cache.reorder([0, 2])
    with pytest.raises(InputError, match="1 sequences cannot take the places of 2"):
        cache.reorder([0])


@pytest.mark.parametrize("length", [5, 60, 120, 400])
def test_cropped_tokens_leave_no_trace(length: int) -> None:
    kept, dropped = random_tokens(2, length), random_tokens(2, 5)
    caches = [Cache(mixed_plan(MAX_LEN, 2), 2, None, torch.float32, CPU) for _ in range(2)]
    for cache in caches:
        feed(cache, kept, [length, length - 2])
    feed(caches[0], dropped)
    caches[0].crop(5)
    assert same(*caches)


def test_what_is_quantized_cannot_be_cropped() -> None:
    cache = Cache(mixed_plan(MAX_LEN, 1), 1, None, torch.float32, CPU)
    feed(cache, random_tokens(1, 190))
    before = [(list(store.rows), list(store.flushed)) for store in cache.layers]
    with pytest.raises(InputError, match=r"127 tokens cannot be taken back from this cache: its last \d+ are not"):
        cache.crop(127)
    with pytest.raises(InputError, match="cannot be taken back"):
        cache.crop(-1)
    assert [(list(store.rows), list(store.flushed)) for store in cache.layers] == before
    assert cache.length == [190]


def test_a_cropped_sliding_window_still_holds_all_that_it_sees() -> None:
    """Step by step through a window whose passed blocks are gone, taking back as much as is allowed each time."""
    plan = mixed_plan(MAX_LEN, 1)
    cache = Cache(plan, 1, None, torch.float32, CPU)
    store, window = cache.layers[2], 200
    for step in range(60):
        feed(cache, random_tokens(1, 1 + 7 * step % 23))
        cache.crop(min(3, min(layer.croppable(0) for layer in cache.layers)))
        length = cache.length[0]
        assert set(store.positions(0).tolist()) >= set(range(max(0, length + 1 - window), length))


def test_a_reset_cache_starts_anew_in_the_same_memory() -> None:
    tokens = random_tokens(2, 300)
    cache, fresh = (Cache(mixed_plan(MAX_LEN, 2), 2, None, torch.float32, CPU) for _ in range(2))
    feed(cache, random_tokens(2, 800))
    arenas = [store.arena.data_ptr() for store in cache.layers]
    cache.reset()
    assert cache.bytes_used == 0
    assert [store.arena.data_ptr() for store in cache.layers] == arenas
    for used in (cache, fresh):
        feed(used, tokens)
    assert same(cache, fresh)
