"""Linear maps of K and V that are matched to what the model puts there and to what it does with it.

V of a head may be multiplied by any matrix M whose inverse follows the attention. Codes of a token share a step in
proportion to the spread of its channels, so with channels alike the squared error of the output goes with

    tr(M^T C M) * tr(M^-1 G M^-T)

where C is the covariance of V over the calibration tokens and G the second moment of the loss's gradients at the
attention's output (Fisher information). By Cauchy-Schwarz that is least where M M^T is the geometric mean of C^-1
and G,

    M M^T = C^-1/2 (C^1/2 G C^1/2)^1/2 C^-1/2

(transform coding at equal rates: directions that vary much and matter little get coarse steps). M is its symmetric
root, then a rotation that makes channels alike: Hadamard's, turned such that the mean of V becomes the same number in
every channel, which the middle of each token's group takes up for nothing.

K is met behind RoPE, where no matrix can be folded; only the rotation is used there, made of the mean of K.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from pmkvq_compiler.calibrate.attention_hook import AttentionCall
from pmkvq_compiler.runtime.rotation import hadamard

FLOOR = 0.1
"""Share of the mean eigenvalue that is added to those of C and G: neither a few texts' idea of what never happens nor
the rounding of folded weights is to be magnified."""


class Moments:
    """Observes attention calls and, while gradients come back, sums up what the maps are made of, layer by layer."""

    def __init__(self) -> None:
        self.tokens: dict[int, int] = {}
        self.key: dict[int, Tensor] = {}
        self.value: dict[int, Tensor] = {}
        self.value_square: dict[int, Tensor] = {}
        self.gradient_square: dict[int, Tensor] = {}

    def __call__(self, call: AttentionCall) -> Tensor:
        output = call.output()
        key, value = (x.detach()[0].to(torch.float64) for x in (call.key, call.value))
        self.tokens[call.layer] = self.tokens.get(call.layer, 0) + key.shape[1]
        _add(self.key, call.layer, key.sum(1))
        _add(self.value, call.layer, value.sum(1))
        _add(self.value_square, call.layer, value.transpose(1, 2) @ value)
        output.register_hook(partial(self._add_gradient, call.layer, value.shape[0]))
        return output

    def _add_gradient(self, layer: int, heads: int, gradient: Tensor) -> None:
        by_head = gradient[0].unflatten(0, (heads, -1)).flatten(1, 2).to(torch.float64)
        _add(self.gradient_square, layer, by_head.transpose(1, 2) @ by_head)

    def key_rotations(self) -> dict[int, Tensor]:
        """For each layer the rotations [Hkv, dk, dk] (float64, CPU) of K."""
        return {layer: _spreading(total.cpu()) for layer, total in self.key.items()}

    def value_matrices(self) -> dict[int, Tensor]:
        """For each layer the matrices [Hkv, dv, dv] (float64, CPU) of V."""
        matrices = {}
        for layer, square in self.value_square.items():
            tokens = self.tokens[layer]
            mean = self.value[layer].cpu() / tokens
            covariance = square.cpu() / tokens - mean.unsqueeze(2) * mean.unsqueeze(1)
            matrices[layer] = matched(mean, covariance, self.gradient_square[layer].cpu())
        return matrices


def matched(mean: Tensor, covariance: Tensor, importance: Tensor) -> Tensor:
    """The matrices M [H, d, d] for values of mean [H, d] and covariance C [H, d, d], errors of which are weighed by
    importance G [H, d, d]; all float64."""
    covariance, importance = _floored(covariance), _floored(importance)
    root = _power(covariance, 0.5)
    inner = _power(root @ importance @ root, 0.5)
    inverse = torch.linalg.inv(root)
    metric = _power(inverse @ inner @ inverse, 0.5)
    return metric @ _spreading((mean.unsqueeze(1) @ metric).squeeze(1))


def _spreading(mean: Tensor) -> Tensor:
    """Rotations [H, d, d] by which a mean [H, d] gets equal channels: a reflection, then Hadamard's rotation."""
    rotation = hadamard(mean.shape[-1])
    target = rotation.sum(1) / mean.shape[-1] ** 0.5
    norm = mean.norm(dim=-1, keepdim=True)
    across = torch.where(norm > 0, mean / norm, target) - target
    length = across.norm(dim=-1, keepdim=True)
    across = torch.where(length > 0, across / length, 0.0)
    reflection = torch.eye(mean.shape[-1], dtype=torch.float64) - 2 * across.unsqueeze(2) * across.unsqueeze(1)
    return reflection @ rotation


def _floored(moments: Tensor) -> Tensor:
    """Positive definite: with `FLOOR` of the mean eigenvalue added to all; the identity where all are zero."""
    mean = moments.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
    eye = torch.eye(moments.shape[-1], dtype=torch.float64)
    return torch.where(mean > 0, moments / mean, 0.0) + FLOOR * eye


def _power(x: Tensor, exponent: float) -> Tensor:
    """Powers of symmetric positive definite matrices [H, d, d]."""
    values, vectors = torch.linalg.eigh((x + x.transpose(1, 2)) / 2)
    return (vectors * values.clamp(min=0).pow(exponent).unsqueeze(1)) @ vectors.transpose(1, 2)


def _add(sums: dict[int, Tensor], layer: int, value: Tensor) -> None:
    sums[layer] = sums[layer] + value if layer in sums else value
