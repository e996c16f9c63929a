"""The formats that K or V of a layer may be stored in, and what they do to a tensor."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from pmkvq_compiler.recipes import Recipe
from pmkvq_compiler.runtime.plan import KeyAxis
from pmkvq_compiler.runtime.quantize import fake_quantize
from pmkvq_compiler.threads import one_thread

Transform = Literal["none", "scale", "rotate", "match"]
"""What each head of a tensor is multiplied by before it is quantized: nothing, a diagonal matrix of inverse scales (K
alone), a Hadamard matrix, or the matrix that `calibrate.transforms` matches to the calibration texts."""


@dataclass(frozen=True)
class Format:
    """One way to store K or V: the bits of a code, whether a token or a channel forms a group, the transform, and the
    window in tokens."""

    bits: int
    axis: KeyAxis
    transform: Transform
    window: int


def key_formats(recipe: Recipe, bits: tuple[int, ...], can_scale: bool) -> list[Format]:
    """The formats of K. Where scales cannot be folded or K is grouped by channel, the transform "scale" becomes
    "none"."""

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
    """The formats of V. Where nothing can be folded, all transforms become "none"."""
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
    """Groups of formats that differ only in their windows, each with a format of window 0 that they share."""
    codes: dict[Format, list[Format]] = {}
    for kept in formats:
        codes.setdefault(replace(kept, window=0), []).append(kept)
    return list(codes.items())


def stored(x: Tensor, kept: Format, sink: int, block: int, matrices: Tensor | None = None) -> Tensor:
    """K or V [B, H, S, d] as read back from a format: whole blocks after the sink are quantized, the rest is exact.

    `matrices` [H, d, d] (float64) belong to the format's transform; None means that there is nothing to multiply by.
    """
    if matrices is None:
        return as_cached(x, kept.bits, kept.axis, sink, block)
    transformed = as_cached(x @ matrices.to(x), kept.bits, kept.axis, sink, block)
    return transformed @ inverse_of(matrices).to(x)


_INVERSES = WeakTensorKeyDictionary()


def inverse_of(matrices: Tensor) -> Tensor:
    """The inverses of matrices [H, d, d]. They are kept as long as the matrices are, because each text, code and plan
    asks for those of the same layers."""
    if matrices not in _INVERSES:
        with one_thread():
            _INVERSES[matrices] = torch.linalg.inv(matrices)
    inverses: Tensor = _INVERSES[matrices]
    return inverses


def as_cached(x: Tensor, bits: int, axis: KeyAxis, sink: int, block: int) -> Tensor:
    """K or V [..., S, d] as the cache gives it back: whole blocks after the sink are quantized, the rest is exact.

    The groups are one token's d channels ("token") or one channel's `block` tokens ("channel").
    """
    blocks = max(0, x.shape[-2] - sink) // block
    quantized = x[..., sink : sink + blocks * block, :].unflatten(-2, (blocks, block))
    quantized = fake_quantize(quantized, bits, -1 if axis == "token" else -2).flatten(-3, -2)
    return torch.cat([x[..., :sink, :], quantized, x[..., sink + blocks * block :, :]], dim=-2)


Losses = dict[int, dict[Format, float]]
"""For each layer and format, a measure of what the format costs: summed over the texts, or their mean."""
