"""Ops of the generated model that take the place of several, in plain PyTorch. A device may run each as one kernel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from .experts import grouped_mm, grouped_mm_on_device

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "gelu_tanh": partial(F.gelu, approximate="tanh")}
"""The activations of gates, by name."""

Biases = Sequence[Tensor] | None


def linears(
    x: Tensor, weights: Sequence[Tensor], biases: Biases = None, norm: Tensor | None = None, eps: float = 0.0
) -> tuple[Tensor, ...]:
    """Linear layers of one input: of `x` [..., K], or of its RMS norm if the norm's weights `norm` [K] are given.

    `weights` are [N, K] and `biases` [N]. The results are [..., N].
    """
    if norm is not None:
        x = F.rms_norm(x, [x.shape[-1]], norm, eps)
    if biases is None:
        return tuple(F.linear(x, weight) for weight in weights)
    return tuple(F.linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True))


def gated_linear(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Biases,
    activation: str,
    norm: Tensor | None = None,
    eps: float = 0.0,
) -> Tensor:
    """The activation of a linear layer, the gate, times another linear layer: [..., N]. See `linears`."""
    gate, up = linears(x, weights, biases, norm, eps)
    return ACTIVATIONS[activation](gate) * up


def linear_add(residual: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`residual` [..., N] plus a linear layer of `x` [..., K], whose weight is [N, K] and whose bias is [N]."""
    return residual + F.linear(x, weight, bias)


def rope(heads: Sequence[Tensor], cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
    """Queries and keys [B, H, S, d] turned by their positions. Channel i is paired with channel i + d / 2; `cos` and
    `sin` are [B, 1, S, d]."""
    return tuple(
        x * cos + torch.cat([-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]], -1) * sin for x in heads
    )


def joined(tensors: Sequence[Tensor]) -> Tensor | None:
    """Tensors that lie one behind the other in memory as one, joined in their first dimension. None if they do not."""
    first, rows = tensors[0], 0
    for tensor in tensors:
        if not tensor.is_contiguous() or tensor.shape[1:] != first.shape[1:]:
            return None
        behind = first.storage_offset() + rows * first.stride(0) == tensor.storage_offset()
        if not behind or tensor.untyped_storage().data_ptr() != first.untyped_storage().data_ptr():
            return None
        rows += len(tensor)
    return first.as_strided((rows, *first.shape[1:]), first.stride(), first.storage_offset())


def merged_linears(
    x: Tensor, weights: Sequence[Tensor], biases: Biases = None, norm: Tensor | None = None, eps: float = 0.0
) -> tuple[Tensor, ...]:
    """`linears` by one product, if the weights lie side by side. The results are then parts of one tensor."""
    weight, bias = joined(weights), None if biases is None else joined(biases)
    if weight is None or (bias is None) is not (biases is None):
        return linears(x, weights, biases, norm, eps)
    (together,) = linears(x, [weight], None if bias is None else [bias], norm, eps)
    return tuple(together.split([len(one) for one in weights], -1))


@dataclass(frozen=True, kw_only=True)
class Ops:
    """The ops as the generated model calls them."""

    grouped_mm: Callable[[Tensor, Tensor, Tensor], Tensor] = grouped_mm

    def for_graphs(self) -> Ops:
        """The same ops where the host reads none of the device's numbers, so that a CUDA graph can hold them."""
        return replace(self, grouped_mm=grouped_mm_on_device)

    linears = staticmethod(linears)
    gated_linear = staticmethod(gated_linear)
    linear_add = staticmethod(linear_add)
    rope = staticmethod(rope)


PLAIN = Ops()
