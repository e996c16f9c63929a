"""How K or V of a layer may be kept, and what a tensor looks like after it was."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pmkvq_compiler.runtime.plan import KeyAxis
from pmkvq_compiler.runtime.quantize import fake_quantize
from pmkvq_compiler.runtime.rotation import hadamard

Transform = Literal["none", "scale", "rotate"]
"""What is done to a tensor before it is quantized: nothing, each channel divided by its scale (K), or the channels of a
head rotated into one another by a Hadamard matrix."""


@dataclass(frozen=True)
class Format:
    """One way to keep K or V: code width, what shares a group, transform, clip of 2-bit codes, window in tokens."""

    bits: int
    axis: KeyAxis
    transform: Transform
    clip: float
    window: int


def stored(x: Tensor, kept: Format, sink: int, block: int, scale: Tensor | None = None) -> Tensor:
    """K or V [B, H, S, d] as its codes stand for it, whole blocks after the sink quantized, all else exact.

    `scale` [H, d] is needed by the transform "scale".
    """
    match kept.transform:
        case "none":
            return as_cached(x, kept.bits, kept.axis, sink, block, kept.clip)
        case "scale":
            assert scale is not None
            factor = scale.to(x).unsqueeze(-2)
            return as_cached(x / factor, kept.bits, kept.axis, sink, block, kept.clip) * factor
        case "rotate":
            rotation = hadamard(x.shape[-1]).to(x)
            return as_cached(x @ rotation, kept.bits, kept.axis, sink, block, kept.clip) @ rotation.T


def as_cached(x: Tensor, bits: int, axis: KeyAxis, sink: int, block: int, clip: float = 1.0) -> Tensor:
    """K or V [..., S, d] as the cache gives it back: whole blocks after the sink quantized, all else exact.

    The groups are one token's d channels ("token") or one channel's `block` tokens ("channel").
    """
    blocks = max(0, x.shape[-2] - sink) // block
    quantized = x[..., sink : sink + blocks * block, :].unflatten(-2, (blocks, block))
    quantized = fake_quantize(quantized, bits, -1 if axis == "token" else -2, clip).flatten(-3, -2)
    return torch.cat([x[..., :sink, :], quantized, x[..., sink + blocks * block :, :]], dim=-2)
