"""The number format of PM-KVQ and of the methods that it is compared with, for simulations of them.

A group has two fp16 numbers and codes whose levels reach both ends of the range, in steps of `range / (2^b - 1)`:

    x = mid + (c - (2^b - 1) / 2) * range / (2^b - 1)

Codes are made at 16 bits and lowered by the paper's equivalent right shift, `round(c / (2^n + 1))` from 2n to n bits,
whose result is the code quantized at n bits at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch import Tensor

from pmkvq_compiler import formats
from pmkvq_compiler.calibrate import gradient_product
from pmkvq_compiler.runtime import records

PARAMETER_BITS = 32
LARGEST_FP16 = 65504.0
WIDEST = 16


@contextmanager
def papers_format() -> Iterator[None]:
    """Within it, plans count two fp16 numbers a group, and K and V are calibrated and scored in this format."""
    with (
        patch.object(records, "PARAMETER_BITS", PARAMETER_BITS),
        patch.object(formats, "fake_quantize", fake_quantize),
        patch.object(gradient_product, "fake_quantize", fake_quantize),
    ):
        yield


def fake_quantize(x: Tensor, bits: int, dim: int) -> Tensor:
    """`x` after a round trip through codes lowered to `bits` bits, groups along `dim`; shape and dtype of `x`."""
    mid, value_range = group_parameters(x, dim)
    top = (1 << WIDEST) - 1
    steps_per_unit = torch.where(value_range > 0, top / value_range, 0.0)
    codes = ((x.to(torch.float32) - mid) * steps_per_unit + top / 2).round_().clamp_(0, top).to(torch.int32)
    width = WIDEST
    while width > bits:
        codes, width = right_shift(codes, width), width // 2
    top = (1 << bits) - 1
    return (mid + (codes.to(torch.float32) - top / 2) * (value_range / top)).to(x.dtype)


def group_parameters(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Middles and ranges, fp16 numbers as float32, `dim` kept at size 1; ranges are rounded up, so nothing clips."""
    low, high = (bound.to(torch.float32) for bound in torch.aminmax(x, dim=dim, keepdim=True))
    mid = (low / 2 + high / 2).clamp(-LARGEST_FP16, LARGEST_FP16).to(torch.float16).to(torch.float32)
    exact = (2 * torch.maximum(high - mid, mid - low)).clamp(max=LARGEST_FP16)
    nearest = exact.to(torch.float16)
    next_larger = (nearest.view(torch.int16) + 1).view(torch.float16)
    return mid, torch.where(nearest.to(torch.float32) < exact, next_larger, nearest).to(torch.float32)


def right_shift(codes: Tensor, bits: int) -> Tensor:
    """The paper's equivalent right shift of codes (int32) from `bits` = 2n to n bits."""
    n = bits // 2
    wide = codes.to(torch.int64)
    scaled = (wide << 2 * n) - (wide << n) + wide
    half = (1 << (3 * n - 1)) - (1 << (2 * n - 1)) + (1 << (n - 1))
    return ((scaled + half) >> 3 * n).to(codes.dtype)
