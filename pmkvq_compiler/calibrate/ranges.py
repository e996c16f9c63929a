"""Powers of two that bring K and V to magnitudes where the range of a group can be stored well.

The range of a group is stored in one byte. From 2^-14 to 2^16, its values are an eighth of a power of two apart; below
2^-14 they are coarser, and the smallest is 2^-17. The magnitude of a model's V is arbitrary: V can be multiplied by any
number if the output projection is divided by it. The same is true of K and the queries. Where V or K comes close to an
end of that span, its heads are therefore multiplied by powers of two, which changes no digit of any number. All others
stay as they are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pmkvq_compiler.calibrate.attention_hook import AttentionCall

USUAL = (2.0**-9, 2.0**11)
"""Smallest and largest range of a typical token that leave room for smaller and larger ranges of other tokens."""

HEADROOM = 8
"""The distance, in powers of two, that scaled weights keep from the largest and the smallest normal number of their
dtype."""


class Ranges:
    """Observes attention calls and keeps the typical range of a token in each head of K and V, for each layer. Only the
    last call of a layer counts."""

    def __init__(self) -> None:
        self.key: dict[int, Tensor] = {}
        self.value: dict[int, Tensor] = {}

    def __call__(self, call: AttentionCall) -> None:
        self.key[call.layer], self.value[call.layer] = _typical(call.key), _typical(call.value)


def _typical(x: Tensor) -> Tensor:
    """The median range of the tokens in the first sequence of `x` [B, H, S, d]: float64 [H], on the CPU."""
    low, high = torch.aminmax(x[0].detach().to(torch.float64), dim=-1)
    return (high - low).median(dim=-1).values.cpu()


def unusual(ranges: Tensor) -> Tensor:
    """Which ranges lie outside of the usual span. A range of zero does not: no factor would change it."""
    return (ranges > 0) & ((ranges < USUAL[0]) | (ranges > USUAL[1]))


def exponents(ranges: Tensor, multiplied: Tensor, divided: Tensor, dtype: torch.dtype) -> Tensor:
    """Exponents [H] (float64) of the powers of two that bring heads of typical `ranges` [H] to about 1; 0 for ranges in
    the usual span.

    They are limited so that the weights that are `multiplied` and those that are `divided` stay normal numbers of
    `dtype`. So no digit is lost.
    """
    wanted = torch.where(unusual(ranges), -torch.log2(ranges).round(), 0.0)
    info = torch.finfo(dtype)
    highest, lowest = torch.tensor([info.max, info.tiny], dtype=torch.float64).log2() + torch.tensor(
        [-HEADROOM, HEADROOM]
    )
    up, down = (weight.abs().max().to(torch.float64).log2() for weight in (multiplied, divided))
    most = torch.minimum(highest - up, down - lowest).clamp(min=0).floor()
    least = torch.maximum(lowest - up, down - highest).clamp(max=0).ceil()
    return wanted.clamp(least, most)
