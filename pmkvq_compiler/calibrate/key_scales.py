"""Reparameterization scales of K, found as in PM-KVQ by a search over a grid of exponents for each layer.

Before K is quantized, each channel is divided by a scale, and Q is multiplied by it. q . k stays the same, but the
channels of a token, which share a group, become more equal in size. The scale is `s = max|K| ** alpha`. The maximum is
taken over the calibration tokens and over both channels of a RoPE pair (i, i + d / 2), because RoPE mixes them. The
search serves groups along a token ("token"); in a group along one channel ("channel"), a scale makes no difference.
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
"""Number of query positions, spread evenly over a sample, at which candidates are compared."""


def candidate_scales(maxima: Tensor) -> Tensor:
    """Scales [GRID + 1, Hkv, d] (float64) for alpha = 0 (no scaling), 1 / GRID, ..., 1, from maxima [Hkv, d]."""
    first, second = maxima.to(torch.float64).chunk(2, dim=-1)
    paired = torch.maximum(first, second).repeat(1, 2)
    alphas = torch.linspace(0, 1, GRID + 1, dtype=torch.float64, device=maxima.device).reshape(-1, 1, 1)
    return (paired**alphas).clamp(SMALLEST, LARGEST)


class ScaleSearch:
    """Observes attention calls and adds up, for each layer and candidate, the error of the attention's output.

    The error is the mean squared difference from the exact output, before the output projection, when K and V are
    quantized by token at `bits`.
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
        scales = self.candidates[call.layer].to(call.key).unsqueeze(-2)
        keys = as_cached(call.key / scales, self.bits, "token", self.sink, self.block) * scales
        values = as_cached(call.value, self.bits, "token", self.sink, self.block)
        error = (sampled.output(keys, values) - sampled.output()).to(torch.float64).square().mean(dim=(1, 2, 3))
        self.errors[call.layer] += error.cpu()

    def best(self) -> tuple[dict[int, float], dict[int, Tensor]]:
        """For each layer, alpha and scales [Hkv, d] (float64, CPU) of least error; the smallest alpha in a tie."""
        chosen = {layer: int(error.argmin()) for layer, error in self.errors.items()}
        alphas = {layer: index / GRID for layer, index in chosen.items()}
        return alphas, {layer: self.candidates[layer][index].cpu() for layer, index in chosen.items()}
