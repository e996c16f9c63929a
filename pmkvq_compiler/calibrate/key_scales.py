"""Reparameterization scales of K, found as in PM-KVQ: a grid of exponents for each layer.

K is divided by a scale a channel before it is quantized, and Q multiplied by it, so that q . k stays the same while the
channels of a token, which share a group, get closer in size. The scale is `s = max|K| ** alpha`, the maximum taken over
the calibration tokens and over both channels of a RoPE pair (i, i + d / 2), which rotation mixes. Groups along one
channel ("channel") are indifferent to any scale of that channel: the search serves groups along a token ("token").
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from pmkvq_compiler.calibrate.attention_hook import AttentionCall
from pmkvq_compiler.formats import as_cached

GRID = 20
SMALLEST, LARGEST = 1e-4, 1e4
QUERIES = 32
"""Query positions of a sample at which candidates are compared, spread over its length."""


def candidate_scales(maxima: Tensor) -> Tensor:
    """Scales [GRID + 1, Hkv, d] (float64) for alpha = 0 (no scaling), 1 / GRID, ..., 1, from maxima [Hkv, d]."""
    first, second = maxima.to(torch.float64).chunk(2, dim=-1)
    paired = torch.maximum(first, second).repeat(1, 2)
    alphas = torch.linspace(0, 1, GRID + 1, dtype=torch.float64, device=maxima.device).reshape(-1, 1, 1)
    return (paired**alphas).clamp(SMALLEST, LARGEST)


class ScaleSearch:
    """Observes attention calls and adds up, for each layer and candidate, the error of the attention's output.

    The output is compared where it leaves the heads, before the output projection, as the mean squared error
    against the exact one, with K and V quantized by token at `bits`.
    """

    def __init__(self, maxima: Mapping[int, Tensor], bits: int, sink: int, block: int) -> None:
        self.candidates = {layer: candidate_scales(value) for layer, value in maxima.items()}
        self.bits, self.sink, self.block = bits, sink, block
        self.errors = {layer: torch.zeros(GRID + 1, dtype=torch.float64) for layer in maxima}

    def __call__(self, call: AttentionCall) -> None:
        if call.layer not in self.candidates:
            return
        length = call.key.shape[-2]
        positions = torch.linspace(0, length - 1, min(length, QUERIES), device=call.key.device).long()
        sampled = call.at(positions)
        scales = self.candidates[call.layer].to(call.key.dtype).unsqueeze(-2)
        keys = as_cached(call.key / scales, self.bits, "token", self.sink, self.block) * scales
        values = as_cached(call.value, self.bits, "token", self.sink, self.block)
        error = (sampled.output(keys, values) - sampled.output()).to(torch.float64).square().mean(dim=(1, 2, 3))
        self.errors[call.layer] += error.cpu()

    def best(self) -> tuple[dict[int, float], dict[int, Tensor]]:
        """For each layer alpha and scale [Hkv, d] (float64, CPU) of least error; the smallest alpha among equals."""
        chosen = {layer: int(error.argmin()) for layer, error in self.errors.items()}
        alphas = {layer: index / GRID for layer, index in chosen.items()}
        return alphas, {layer: self.candidates[layer][index].cpu() for layer, index in chosen.items()}
