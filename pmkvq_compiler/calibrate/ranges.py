"""Powers of two that bring K and V to where a group's range is expressed well.

A range is stored in a byte, an eighth of a power of two apart and from 2^-14 to 2^16; below that it gets coarse, and
ends at 2^-17. How large a model's V is is arbitrary: it may be multiplied by any number and the output projection
divided by it; K likewise, with the queries. V and K near an end of that span, or beyond it, are therefore multiplied by
powers of two, head by head, which changes no digit of any number; all others are left as they are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pmkvq_compiler.calibrate.attention_hook import AttentionCall

USUAL = (2.0**-9, 2.0**11)
"""Ranges of a typical token that leave room for those of other tokens on either side."""

HEADROOM = 8
"""Powers of two that multiplied weights stay away from the largest and smallest ordinary numbers of their dtype."""


class Ranges:
    """Observes attention calls; the range of a typical token of each head of K and V, the last call's of each layer."""

    def __init__(self) -> None:
        self.key: dict[int, Tensor] = {}
        self.value: dict[int, Tensor] = {}

    def __call__(self, call: AttentionCall) -> None:
        self.key[call.layer], self.value[call.layer] = _typical(call.key), _typical(call.value)


def _typical(x: Tensor) -> Tensor:
    """The median over the tokens of the first row of `x` [B, H, S, d]: float64 [H], on the CPU."""
    low, high = torch.aminmax(x[0].detach().to(torch.float64), dim=-1)
    return (high - low).median(dim=-1).values.cpu()


def unusual(ranges: Tensor) -> Tensor:
    """Which ranges are not in the usual span; one of zero is nobody's loss."""
    return (ranges > 0) & ((ranges < USUAL[0]) | (ranges > USUAL[1]))


def exponents(ranges: Tensor, multiplied: Tensor, divided: Tensor, dtype: torch.dtype) -> Tensor:
    """Powers of two [H] (float64) by which heads of typical `ranges` [H] come to 1; 0 for those in the usual span.

    They go as far as the weights that are multiplied by them, and those that are divided, stay ordinary numbers of
    `dtype`: no digit is lost.
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
