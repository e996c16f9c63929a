"""How K or V of a layer may be kept, and what a tensor looks like after it was."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from pmkvq_compiler.recipes import Recipe
from pmkvq_compiler.runtime.plan import KeyAxis
from pmkvq_compiler.runtime.quantize import fake_quantize

Transform = Literal["none", "scale", "rotate", "match"]
"""What each head of a tensor is multiplied by before it is quantized: nothing, a diagonal of inverse scales (K), a
Hadamard matrix, or the matrix that `matching` makes of the calibration."""


@dataclass(frozen=True)
class Format:
    """One way to keep K or V: code width, what shares a group, transform, window in tokens."""

    bits: int
    axis: KeyAxis
    transform: Transform
    window: int


def key_formats(recipe: Recipe, bits: tuple[int, ...], can_scale: bool) -> list[Format]:
    """The ways to keep K; where scales cannot be folded, or K is grouped by channel, "scale" becomes "none"."""

    def transforms(axis: KeyAxis) -> dict[Transform, None]:
        scales = can_scale and axis == "token"
        return dict.fromkeys("none" if one == "scale" and not scales else one for one in recipe.key_transforms)

    return [
        Format(width, axis, transform, window)
        for width in bits
        for axis in recipe.key_axes
        for transform in transforms(axis)
        for window in recipe.windows
    ]


def value_formats(recipe: Recipe, bits: tuple[int, ...], can_transform: bool) -> list[Format]:
    """The ways to keep V; where nothing can be folded, all transforms are "none"."""
    transforms: dict[Transform, None] = dict.fromkeys(
        one if can_transform else "none" for one in recipe.value_transforms
    )
    return [
        Format(width, "token", transform, window)
        for width in bits
        for transform in transforms
        for window in recipe.windows
    ]


def by_code(formats: Iterable[Format]) -> list[tuple[Format, list[Format]]]:
    """Formats that differ in nothing but the window."""
    codes: dict[Format, list[Format]] = {}
    for kept in formats:
        codes.setdefault(replace(kept, window=0), []).append(kept)
    return list(codes.items())


def stored(x: Tensor, kept: Format, sink: int, block: int, matrices: Tensor | None = None) -> Tensor:
    """K or V [B, H, S, d] as its codes stand for it, whole blocks after the sink quantized, all else exact.

    `matrices` [H, d, d] (float64) are those of the format's transform, None where it has none.
    """
    if matrices is None:
        return as_cached(x, kept.bits, kept.axis, sink, block)
    transformed = as_cached(x @ matrices.to(x), kept.bits, kept.axis, sink, block)
    return transformed @ torch.linalg.inv(matrices).to(x)


def as_cached(x: Tensor, bits: int, axis: KeyAxis, sink: int, block: int) -> Tensor:
    """K or V [..., S, d] as the cache gives it back: whole blocks after the sink quantized, all else exact.

    The groups are one token's d channels ("token") or one channel's `block` tokens ("channel").
    """
    blocks = max(0, x.shape[-2] - sink) // block
    quantized = x[..., sink : sink + blocks * block, :].unflatten(-2, (blocks, block))
    quantized = fake_quantize(quantized, bits, -1 if axis == "token" else -2).flatten(-3, -2)
    return torch.cat([x[..., :sink, :], quantized, x[..., sink + blocks * block :, :]], dim=-2)


Losses = dict[int, dict[Format, float]]
"""By layer and format, the sum over texts of a measure."""
