"""Attention over the cache equals attention over the numbers that the cache's codes stand for, in float64."""

import pytest
import torch
from torch import Tensor

from pmkvq_compiler.runtime.attention import cached_attention
from pmkvq_compiler.runtime.cache import Cache
from pmkvq_compiler.runtime.layer_cache import LayerCache, Records
from pmkvq_compiler.runtime.quantize import decode, unpack

from .plans import cache_plan, layer_plan


def stored_numbers(store: LayerCache, sequence: int) -> tuple[Tensor, Tensor, Tensor]:
    """K, V [H, T, d] (float64) and positions [T] of everything that a sequence has in the cache."""
    keys, values = record_numbers(store.records(sequence, 0, store.live_blocks(sequence)))
    rows = store.rows[sequence]
    return (
        torch.cat([keys, store.keys[sequence, :, :rows]], dim=1).double(),
        torch.cat([values, store.values[sequence, :, :rows]], dim=1).double(),
        store.positions(sequence),
    )


def record_numbers(records: Records) -> tuple[Tensor, Tensor]:
    """K and V [H, T, d] that codes stand for."""
    axis = 2 if records.key_by_channel else -1
    key_parameters, value_parameters = records.key_parameters.unsqueeze(axis), records.value_parameters.unsqueeze(-1)
    key_codes = unpack(records.key_codes.view(torch.int16), records.key_bits)
    value_codes = unpack(records.value_codes.view(torch.int16), records.value_bits).transpose(-1, -2)
    keys = decode(key_codes, key_parameters, records.key_bits).flatten(1, 2)
    return keys, decode(value_codes, value_parameters, records.value_bits).flatten(1, 2)


def reference(
    q: Tensor, keys: Tensor, values: Tensor, visible: Tensor, scale: float, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    """Attention of q [Hq, S, d] in float64."""
    heads = keys.shape[0]
    scores = torch.einsum("hgsd,htd->hgst", q.double().unflatten(0, (heads, -1)), keys) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(~visible, float("-inf"))
    if sinks is not None:
        column = sinks.double().reshape(heads, -1, 1, 1).expand(*scores.shape[:3], 1)
        weights = torch.cat([scores, column], -1).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1)
    return torch.einsum("hgst,htd->hgsd", weights, values).flatten(0, 1)


@pytest.mark.parametrize("axis", ["token", "channel"])
@pytest.mark.parametrize("sliding_window", [None, 100, 180])
@pytest.mark.parametrize(
    ("bits", "head_dim"), [((4, 2), 64), ((2, 2), 80), ((2, 8), 96), ((16, 4), 128), ((8, 16), 256)]
)
@pytest.mark.parametrize("extras", [False, True])
def test_every_step_of_a_run_to_max_len(
    axis: str, sliding_window: int | None, bits: tuple[int, int], head_dim: int, extras: bool
) -> None:
    torch.manual_seed(head_dim + 7 * extras)
    max_len, group, scale = 300, 2, head_dim**-0.5
    layer = layer_plan(
        max_len,
        key_axis=axis,
        sliding_window=sliding_window,
        sink=0 if sliding_window else 4,
        window=64,
        block=32,
        key_bits=bits[0],
        value_bits=bits[1],
        key_head_dim=head_dim,
        value_head_dim=head_dim,
    )
    cache = Cache(cache_plan(layer, max_len=max_len), 1, None, torch.float32, torch.device("cpu"))
    store = cache.layers[0]
    store.arena.fill_(0xFF)  # NaN in every format: a number that is read without having been written shows
    softcap, sinks = (5.0, torch.randn(3 * group)) if extras else (None, None)
    offset = 3 * torch.randn(head_dim)
    while cache.length[0] < max_len:
        count = 1 if torch.rand(()) < 0.6 else int(torch.randint(2, 90, ()))
        count = min(count, max_len - cache.length[0])
        start = cache.length[0]
        q = torch.randn(1, 3 * group, count, head_dim)
        k, v = torch.randn(1, 3, count, head_dim) + offset, torch.randn(1, 3, count, head_dim)
        before = stored_numbers(store, 0)
        cache.begin([slice(0, count)])
        out = cached_attention(q, k, v, cache, 0, scale, softcap, sinks)
        cache.end()
        own = torch.arange(start, start + count)
        if count == 1:
            keys, values, positions = stored_numbers(store, 0)
        else:
            keys, values = torch.cat([before[0], k[0].double()], 1), torch.cat([before[1], v[0].double()], 1)
            positions = torch.cat([before[2], own])
        visible = positions <= own.unsqueeze(-1)
        if sliding_window is not None:
            visible &= positions > own.unsqueeze(-1) - sliding_window
        seen = own + 1 if sliding_window is None else (own + 1).clamp(max=sliding_window)
        assert torch.equal(visible.sum(-1), seen), "a token that should be attended to is not in the cache"
        expected = reference(q[0], keys, values, visible, scale, softcap, sinks)
        error = (out[0].double() - expected).norm() / expected.norm()
        assert error < 5e-5
    assert cache.bits == [bits]


def test_ragged_batch_equals_its_sequences_alone() -> None:
    torch.manual_seed(0)
    plan = cache_plan(layer_plan(300, 3), max_len=300, batch_size=3)
    single = cache_plan(layer_plan(300, 1), max_len=300)
    together = Cache(plan, 3, 300, torch.float32, torch.device("cpu"))
    alone = [Cache(single, 1, 300, torch.float32, torch.device("cpu")) for _ in range(3)]
    lengths = [300, 170, 5]
    steps = [[slice(0, 100), slice(30, 100), slice(96, 100)], [slice(0, 1), slice(0, 0), slice(0, 1)]]
    steps += [[slice(0, 199), slice(0, 100), slice(0, 0)]]
    for own in steps:
        width = max(columns.stop for columns in own)
        q, k, v = torch.randn(3, 6, width, 64), torch.randn(3, 3, width, 64), torch.randn(3, 3, width, 64)
        together.begin(own)
        out = cached_attention(q, k, v, together, 0, 0.125)
        together.end()
        for row, columns in enumerate(own):
            if columns.start == columns.stop:
                continue
            part = [tensor[row : row + 1, :, columns] for tensor in (q, k, v)]
            alone[row].begin([slice(0, columns.stop - columns.start)])
            expected = cached_attention(part[0], part[1], part[2], alone[row], 0, 0.125)
            alone[row].end()
            # the batch lowers a layer for all its sequences, so codes may be narrower than alone
            tolerance = 1e-5 if together.bits == alone[row].bits else 0.5
            assert (out[row, :, columns] - expected[0]).norm() / expected.norm() < tolerance
    assert together.length == lengths
