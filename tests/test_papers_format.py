"""Baselines are scored in the number format that their papers have, not weakened by the project's own."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest
import torch

from pmkvq_compiler.formats import as_cached
from pmkvq_compiler.runtime.plan import CODE_BITS, block_bytes

from .runtime.plans import layer_plan

BENCHMARKS = Path(__file__).parent.parent / "examples" / "benchmarks"


@pytest.fixture
def papers(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("papers_format")


@pytest.mark.parametrize("bits", CODE_BITS[:-1])
def test_the_equivalent_right_shift_is_the_rounded_quotient_for_every_code(papers: ModuleType, bits: int) -> None:
    codes = torch.arange(1 << bits, dtype=torch.int32)
    divisor = (1 << bits // 2) + 1
    quotient = (2 * codes.to(torch.int64) + divisor).div(2 * divisor, rounding_mode="floor")
    assert torch.equal(papers.right_shift(codes, bits), quotient.to(torch.int32))


@pytest.mark.parametrize("bits", CODE_BITS)
@pytest.mark.parametrize("dim", [-1, -2])
def test_levels_reach_both_ends_of_a_group_and_errors_are_at_most_half_a_step(
    papers: ModuleType, bits: int, dim: int
) -> None:
    x = torch.randn(5, 64, 80) * torch.rand(5, 64, 80).mul(6).sub(3).exp()
    kept = papers.fake_quantize(x, bits, dim)
    spread = x.amax(dim, keepdim=True) - x.amin(dim, keepdim=True)
    assert ((kept - x).abs() <= spread * (1.01 / (2 * ((1 << bits) - 1)))).all()
    for end in (torch.amin, torch.amax):
        torch.testing.assert_close(end(kept, dim), end(x, dim), rtol=2e-3, atol=2e-3 * spread.max().item())


def test_the_format_is_the_papers_within_its_context_only(papers: ModuleType) -> None:
    layer, x = layer_plan(300, key_axis="token"), torch.randn(1, 2, 132, 64)
    own = block_bytes(layer, 2, 2), as_cached(x, 2, "token", 4, 64)
    with papers.papers_format():
        assert block_bytes(layer, 2, 2) - own[0] == 2 * 2 * layer.block, "two bytes more for each group of K and of V"
        theirs = as_cached(x, 2, "token", 4, 64)
    assert torch.equal(theirs[:, :, 4:], papers.fake_quantize(x[:, :, 4:], 2, -1))
    assert not torch.equal(theirs, own[1])
    assert own[0] == block_bytes(layer, 2, 2)
    assert torch.equal(as_cached(x, 2, "token", 4, 64), own[1])
