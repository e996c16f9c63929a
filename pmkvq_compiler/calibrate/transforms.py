"""Linear maps of K and V that are matched to the statistics of these tensors and of the gradients of the loss.

V of a head may be multiplied by any matrix M if M^-1 is applied after the attention. The codes of a token share one
step, which is proportional to the spread of the token's channels. If all channels have a similar spread, the squared
error of the output is therefore proportional to

    tr(M^T C M) * tr(M^-1 G M^-T)

where C is the covariance of V over the calibration tokens, and G is the second moment of the loss's gradients at the
attention's output (Fisher information). By Cauchy-Schwarz, this is smallest if M M^T is the geometric mean of C^-1
and G,

    M M^T = C^-1/2 (C^1/2 G C^1/2)^1/2 C^-1/2

This is transform coding at equal rates: directions that vary much and matter little get coarse steps. M is the
symmetric root of this matrix, followed by a rotation that gives all channels a similar spread. The rotation is a
reflection and then a Hadamard matrix. The reflection is chosen such that the mean of V ends up with the same value in
every channel, which the middle of each token's group represents at no cost.

K is stored after RoPE, where no general matrix can be folded. It is only rotated, in the same way, by its own mean.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from pmkvq_compiler.calibrate.attention_hook import AttentionCall
from pmkvq_compiler.runtime.rotation import hadamard
from pmkvq_compiler.threads import one_thread

FLOOR = 0.1
"""Share of the mean eigenvalue that is added to all eigenvalues of C and G. Otherwise M would magnify directions that
just do not occur in a few texts, and the rounding of the folded weights."""


class Moments:
    """Observes attention calls and their gradients, and adds up the moments that the maps are computed from."""

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

    def measured(self, layer: int) -> dict[str, Tensor]:
        """The moments of a layer, by their names."""
        found = {name: sums[layer] for name, sums in self._sums().items()}
        return found | {"tokens": torch.tensor(self.tokens[layer])}

    def restore(self, layer: int, tensors: dict[str, Tensor]) -> None:
        """The inverse of `measured`."""
        self.tokens[layer] = int(tensors["tokens"])
        for name, sums in self._sums().items():
            sums[layer] = tensors[name]

    def _sums(self) -> dict[str, dict[int, Tensor]]:
        return {
            "key": self.key,
            "value": self.value,
            "value_square": self.value_square,
            "gradient_square": self.gradient_square,
        }

    def key_rotations(self) -> dict[int, Tensor]:
        """For each layer, the rotations [Hkv, dk, dk] (float64, CPU) of K."""
        return {layer: _spreading(total.cpu()) for layer, total in self.key.items()}

    def value_matrices(self) -> dict[int, Tensor]:
        """For each layer, the matrices [Hkv, dv, dv] (float64, CPU) of V."""
        matrices = {}
        with one_thread():
            for layer, square in self.value_square.items():
                tokens = self.tokens[layer]
                mean = self.value[layer].cpu() / tokens
                covariance = square.cpu() / tokens - mean.unsqueeze(2) * mean.unsqueeze(1)
                matrices[layer] = matched(mean, covariance, self.gradient_square[layer].cpu())
        return matrices


def matched(mean: Tensor, covariance: Tensor, importance: Tensor) -> Tensor:
    """The matrices M [H, d, d] for values with `mean` [H, d] and `covariance` C [H, d, d], whose errors are weighted by
    `importance` G [H, d, d]; all are float64."""
    covariance, importance = _floored(covariance), _floored(importance)
    root = _power(covariance, 0.5)
    inner = _power(root @ importance @ root, 0.5)
    inverse = torch.linalg.inv(root)
    metric = _power(inverse @ inner @ inverse, 0.5)
    return metric @ _spreading((mean.unsqueeze(1) @ metric).squeeze(1))


def _spreading(mean: Tensor) -> Tensor:
    """Rotations [H, d, d] that make all channels of a `mean` [H, d] equal: a reflection, then a Hadamard matrix."""
    rotation = hadamard(mean.shape[-1])
    target = rotation.sum(1) / mean.shape[-1] ** 0.5
    norm = mean.norm(dim=-1, keepdim=True)
    across = torch.where(norm > 0, mean / norm, target) - target
    length = across.norm(dim=-1, keepdim=True)
    across = torch.where(length > 0, across / length, 0.0)
    reflection = torch.eye(mean.shape[-1], dtype=torch.float64) - 2 * across.unsqueeze(2) * across.unsqueeze(1)
    return reflection @ rotation


def _floored(moments: Tensor) -> Tensor:
    """Moments [H, d, d] divided by their mean eigenvalue, with `FLOOR` added to every eigenvalue, which makes them
    positive definite. Moments that are all zero become a multiple of the identity."""
    mean = moments.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
    eye = torch.eye(moments.shape[-1], dtype=torch.float64)
    return torch.where(mean > 0, moments / mean, 0.0) + FLOOR * eye


def _power(x: Tensor, exponent: float) -> Tensor:
    """Powers of symmetric positive definite matrices [H, d, d]."""
    values, vectors = torch.linalg.eigh((x + x.transpose(1, 2)) / 2)
    return (vectors * values.clamp(min=0).pow(exponent).unsqueeze(1)) @ vectors.transpose(1, 2)


def _add(sums: dict[int, Tensor], layer: int, value: Tensor) -> None:
    """Add to the sum of a layer. The layers that read one cache may be on several devices."""
    sums[layer] = sums[layer] + value.to(sums[layer].device) if layer in sums else value
