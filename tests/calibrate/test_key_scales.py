"""The search finds the scale that harms the attention least, and its scales survive RoPE."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pmkvq_compiler.calibrate.attention_hook import AttentionCall
from pmkvq_compiler.calibrate.key_scales import GRID, LARGEST, QUERIES, SMALLEST, ScaleSearch, candidate_scales
from pmkvq_compiler.formats import as_cached
from pmkvq_compiler.runtime.plan import FINAL_BITS
from pmkvq_compiler.runtime.quantize import fake_quantize

HEADS, TOKENS, CHANNELS, SINK, BLOCK = 2, 100, 32, 4, 32


def attention(outliers: float, layer: int = 0) -> AttentionCall:
    """Four query heads on two key heads, two channels of whose keys (a RoPE pair) are `outliers` times the others."""
    generator = torch.Generator().manual_seed(layer)
    query, key, value = (torch.randn(1, heads, TOKENS, CHANNELS, generator=generator) for heads in (4, HEADS, HEADS))
    key[..., 3] *= outliers
    key[..., 3 + CHANNELS // 2] *= outliers
    return AttentionCall(layer, query, key, value, None, CHANNELS**-0.5, None, None)


def maxima(call: AttentionCall) -> Tensor:
    return call.key.abs().amax(dim=(0, 2))


def test_both_channels_of_a_rope_pair_have_the_same_scale() -> None:
    first, second = candidate_scales(torch.rand(HEADS, CHANNELS)).chunk(2, dim=-1)
    assert torch.equal(first, second)


def test_the_grid_runs_from_no_scaling_to_the_maxima_themselves() -> None:
    values = torch.rand(HEADS, CHANNELS // 2).repeat(1, 2) + 0.1
    scales = candidate_scales(values)
    assert scales.shape == (GRID + 1, HEADS, CHANNELS)
    assert scales.dtype == torch.float64
    assert torch.equal(scales[0], torch.ones_like(scales[0]))
    torch.testing.assert_close(scales[-1], values.double())


def test_scales_stay_within_their_bounds_where_channels_are_dead_or_huge() -> None:
    scales = candidate_scales(torch.tensor([[0.0, 1e9, 0.0, 1e9]]))
    assert scales[1:].min() == SMALLEST
    assert scales.max() == LARGEST


def test_outlier_channels_are_scaled_and_that_lowers_the_error() -> None:
    call = attention(outliers=30.0)
    search = ScaleSearch({0: maxima(call)}, bits=2, sink=SINK, block=BLOCK)
    search(call)
    alphas, scales = search.best()
    assert alphas[0] > 0.3
    assert search.errors[0].min() < 0.5 * search.errors[0][0]
    assert scales[0][0, 3] > 3 * scales[0][0, 0]


def test_the_chosen_alpha_is_the_one_of_least_error_over_all_samples() -> None:
    calls = [attention(8.0), attention(1.0)]
    search = ScaleSearch({0: maxima(calls[0])}, bits=4, sink=SINK, block=BLOCK)
    expected = torch.zeros(GRID + 1, dtype=torch.float64)
    for call in calls:
        search(call)
        value = as_cached(call.value, 4, "token", SINK, BLOCK)
        positions = torch.linspace(0, TOKENS - 1, QUERIES).long()
        for index, scale in enumerate(search.candidates[0].float().unsqueeze(-2)):
            key = as_cached(call.key / scale, 4, "token", SINK, BLOCK) * scale
            error = (call.output(key, value) - call.output())[..., positions, :]
            expected[index] += error.double().square().mean()
    torch.testing.assert_close(search.errors[0], expected, rtol=1e-4, atol=0)
    assert search.best()[0][0] == int(expected.argmin()) / GRID


def test_layers_that_cannot_be_folded_are_left_out() -> None:
    search = ScaleSearch({0: maxima(attention(1.0))}, bits=2, sink=SINK, block=BLOCK)
    search(attention(1.0, layer=7))
    assert set(search.best()[1]) == {0}
    assert not search.errors[0].any()


@pytest.mark.parametrize("bits", FINAL_BITS)
def test_groups_along_a_channel_are_indifferent_to_its_scale(bits: int) -> None:
    key = attention(30.0).key
    scale = 2.0 ** torch.randint(-3, 4, (1, HEADS, 1, CHANNELS))  # powers of two: the fp16 parameters scale exactly
    scaled = as_cached(key / scale, bits, "channel", SINK, BLOCK) * scale
    torch.testing.assert_close(scaled, as_cached(key, bits, "channel", SINK, BLOCK), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("axis", "dim"), [("token", -1), ("channel", -2)])
def test_only_whole_blocks_after_the_sink_are_quantized(axis: str, dim: int) -> None:
    key = attention(1.0).key
    cached = as_cached(key, 2, axis, SINK, BLOCK)  # type: ignore[arg-type]
    blocks = range(SINK, TOKENS - BLOCK + 1, BLOCK)
    for start in blocks:
        block = slice(start, start + BLOCK)
        assert torch.equal(cached[..., block, :], fake_quantize(key[..., block, :], 2, dim))
    exact = [*range(SINK), *range(blocks[-1] + BLOCK, TOKENS)]
    assert torch.equal(cached[..., exact, :], key[..., exact, :])
