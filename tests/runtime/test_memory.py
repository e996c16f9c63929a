"""A decode step needs less beyond the arenas than one layer's cache would take at full precision."""

import weakref
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pmkvq_compiler.runtime.attention import cached_attention
from pmkvq_compiler.runtime.cache import Cache

from .plans import cache_plan, layer_plan


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of storages that operators make while it is active: alive now, and most at once."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {
            leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)
        }
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.untyped_storage()._cdata not in given | set(self.alive):
                storage = leaf.untyped_storage()
                self.alive[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.alive.pop, storage._cdata, None)
        self.peak = max(self.peak, sum(self.alive.values()))
        return result


@pytest.mark.parametrize("axis", ["token", "channel"])
@pytest.mark.parametrize("bits", [(2, 2), (4, 2), (8, 8), (16, 16)])
def test_decode_peak_is_below_one_full_precision_layer(axis: str, bits: tuple[int, int]) -> None:
    max_len, count = 4096, 4000
    layer = layer_plan(max_len, key_bits=bits[0], value_bits=bits[1], key_axis=axis, stages=(bits,))
    cache = Cache(cache_plan(layer, max_len=max_len), 1, None, torch.float32, torch.device("cpu"))
    cache.begin([slice(0, count)])
    cached_attention(torch.randn(1, 9, count, 64), *torch.randn(2, 1, 3, count, 64), cache, 0, 0.125)
    cache.end()
    q, k, v = torch.randn(1, 9, 1, 64), torch.randn(1, 3, 1, 64), torch.randn(1, 3, 1, 64)
    with PeakMemory() as memory:
        for _ in range(3 * layer.block):  # flushes included
            if cache.length[0] == max_len:
                break
            cache.begin([slice(0, 1)])
            cached_attention(q, k, v, cache, 0, 0.125)
            cache.end()
    full_precision = max_len * 3 * (64 + 64) * 4
    assert 0 < memory.peak < full_precision
    print(f"{axis} {bits}: peak {memory.peak:,} of {full_precision:,} bytes")
