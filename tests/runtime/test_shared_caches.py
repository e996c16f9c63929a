"""Layers that share a cache: each attends as a layer with a cache of its own would, if it were fed the same tokens."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pmkvq_compiler.runtime.attention import cached_attention
from pmkvq_compiler.runtime.cache import Cache
from pmkvq_compiler.runtime.rotation import hadamard

from .plans import cache_plan, layer_plan

RAGGED = (
    (0, 70, 0, 70),
    (0, 1, 0, 0),
    (0, 40, 35, 40),
    (0, 1, 0, 1),
    (0, 1, 0, 1),
    (0, 90, 80, 90),
    (0, 80, 40, 80),
    (0, 1, 0, 1),
)
"""Of each call: the first and last column of two sequences."""


def attend_in_turn(cache: Cache, queries: list[Tensor], k: Tensor, v: Tensor, rotation: Tensor | None) -> list[Tensor]:
    outputs = [cached_attention(queries[0], k, v, cache, 0, 0.125, key_rotation=rotation, shared=True)]
    for q in queries[1:]:
        outputs.append(cached_attention(q, None, None, cache, 0, 0.125, key_rotation=rotation))
    return outputs


@pytest.mark.parametrize("sliding_window", [None, 50])
@pytest.mark.parametrize("rotated", [False, True])
def test_all_layers_see_what_the_first_one_sees(sliding_window: int | None, rotated: bool) -> None:
    torch.manual_seed(0)
    layer = layer_plan(300, 2, window=64, block=32, sink=0 if sliding_window else 4, sliding_window=sliding_window)
    rotation = hadamard(64).float().repeat(3, 1, 1) if rotated else None
    shared, *own = (
        Cache(cache_plan(layer, max_len=300, batch_size=2), 2, None, torch.float32, torch.device("cpu"))
        for _ in range(4)
    )
    for cache in (shared, *own):
        cache.layers[0].arena.zero_()
    for one, first, other, last in RAGGED:
        columns = [slice(one, first), slice(other, last)]
        k, v = torch.randn(2, 2, 3, max(first, last), 64).unbind()
        queries = [torch.randn(2, 6, max(first, last), 64) for _ in own]
        for cache in (shared, *own):
            cache.begin(columns)
        before = own[0].bits
        outputs = attend_in_turn(shared, queries, k, v, rotation)
        for q, cache, found in zip(queries, own, outputs, strict=True):
            expected = cached_attention(q, k, v, cache, 0, 0.125, key_rotation=rotation)
            # a cache of one's own that was lowered had been lowered for its first sequence when the second attended
            compared = slice(0, 2 if cache.bits == before else 1)
            assert torch.allclose(found[compared], expected[compared], atol=1e-6)
        for cache in (shared, *own):
            cache.end()
            assert cache.layers[0].counts == own[0].layers[0].counts
            assert torch.equal(cache.layers[0].arena, own[0].layers[0].arena)
    assert shared.bits == own[0].bits
    assert shared.bits[0][0] < 16, "the layer was lowered in between"


def test_a_call_that_breaks_off_before_its_last_layer_leaves_the_cache_as_it_was() -> None:
    torch.manual_seed(0)
    layer = layer_plan(300, 1, window=64, block=32)
    cache = Cache(cache_plan(layer, max_len=300), 1, None, torch.float32, torch.device("cpu"))
    k, v = torch.randn(2, 1, 3, 90, 64).unbind()
    cache.begin([slice(0, 90)])
    attend_in_turn(cache, [torch.randn(1, 6, 90, 64)], k, v, None)
    assert cache.layers[0].rows == [0]
    cache.reset()
    assert cache.waiting == {}
    assert cache.length == [0]
