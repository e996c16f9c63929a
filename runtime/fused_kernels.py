"""The fused ops by an artifact's generated Triton kernels.

One token is multiplied by kernels that read each weight once, with the norm before and the sum or the gate after it.
More tokens are multiplied by PyTorch, in one product where weights lie side by side (`runtime/weights.py`), between
kernels for norm and gate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import fused
from .cubins import CompiledKernels
from .fused import Biases, Ops
from .kernels import overlap

FUSED = "fused"
"""The name of the kernels' file."""

MOST_LAYERS = 3
"""Linear layers that the kernel of one token takes at once."""

MANY_COLUMNS = 4096
"""Columns of a weight up to which a program of the kernel of one token takes few long pieces of rows."""

GATE_BLOCK = 1024
"""Columns of a program that applies gates."""

HEADS_AT_ONCE = 4
"""Heads that a program turns."""


@dataclass(frozen=True)
class FusedKernels(Ops):
    """The ops by `module`, which is rendered from `templates/kernels/fused.py.j2` or was compiled with the artifact."""

    module: ModuleType | CompiledKernels

    def __deepcopy__(self, memo: dict[int, Any]) -> FusedKernels:
        return self  # nothing in it changes

    def linears(
        self, x: Tensor, weights: Sequence[Tensor], biases: Biases = None, norm: Tensor | None = None, eps: float = 0.0
    ) -> tuple[Tensor, ...]:
        """See `fused.linears`."""
        if is_one_token(x):
            out = tuple(x.new_empty(*x.shape[:-1], len(weight)) for weight in weights)
            self._of_one_token(x, weights, biases, out, norm=norm, eps=eps)
            return out
        return fused.merged_linears(x if norm is None else self._normed(x, norm, eps), weights, biases)

    def gated_linear(
        self,
        x: Tensor,
        weights: Sequence[Tensor],
        biases: Biases,
        activation: str,
        norm: Tensor | None = None,
        eps: float = 0.0,
    ) -> Tensor:
        """See `fused.gated_linear`."""
        width = len(weights[0])
        out = x.new_empty(*x.shape[:-1], width)
        if is_one_token(x):
            self._of_one_token(x, weights, biases, (out,), norm=norm, eps=eps, activation=activation)
            return out
        gates, ups = (one.reshape(-1, width) for one in self.linears(x, weights, biases, norm, eps))
        self.module.gate[(len(gates), -(-width // GATE_BLOCK))](
            gates,
            ups,
            out,
            (gates.stride(0), ups.stride(0)),
            WIDTH=width,
            ACTIVATION=activation,
            BLOCK=GATE_BLOCK,
            num_warps=4,
            **overlap(self.module, x.device),
        )
        return out

    def linear_add(self, residual: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """See `fused.linear_add`."""
        if not is_one_token(x):
            return fused.linear_add(residual, x, weight, bias)
        out = torch.empty_like(residual, memory_format=torch.contiguous_format)
        self._of_one_token(x, [weight], None if bias is None else [bias], (out,), residual=residual)
        return out

    def rope(self, heads: Sequence[Tensor], cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        """See `fused.rope`. Results are laid out as [B, S, H, d]."""
        batch, _, tokens, channels = heads[0].shape
        heads = [one if one.stride(-1) == 1 else one.contiguous() for one in heads]
        cos, sin = (one.expand(batch, 1, tokens, channels).contiguous() for one in (cos, sin))
        out = [one.new_empty(batch, tokens, one.shape[1], channels) for one in heads]
        queries, keys = heads[0], heads[-1]
        counts = [one.shape[1] for one in heads] + [0] * (len(heads) == 1)
        self.module.rope[(batch * tokens, sum(-(-count // HEADS_AT_ONCE) for count in counts))](
            queries,
            keys,
            cos,
            sin,
            out[0],
            out[-1],
            queries.stride()[:3],
            keys.stride()[:3],
            cos.stride()[:3],
            tokens,
            QUERY_HEADS=counts[0],
            KEY_HEADS=counts[1],
            HALF=channels // 2,
            HALF_PADDED=power_of_two(channels // 2),
            HEADS=HEADS_AT_ONCE,
            num_warps=1,
            **overlap(self.module, cos.device),
        )
        return tuple(one.transpose(1, 2) for one in out)

    def _normed(self, x: Tensor, norm: Tensor, eps: float) -> Tensor:
        """The RMS norm of `x` [..., K], whose weights are `norm` [K]."""
        width, x = x.shape[-1], x.contiguous()
        padded = power_of_two(width)
        out = torch.empty_like(x)
        self.module.rms_norm[(x.numel() // width,)](
            x,
            norm,
            out,
            eps,
            WIDTH=width,
            PADDED=padded,
            num_warps=min(8, max(1, padded // 512)),
            **overlap(self.module, x.device),
        )
        return out

    def _of_one_token(
        self,
        x: Tensor,
        weights: Sequence[Tensor],
        biases: Biases,
        out: Sequence[Tensor],
        norm: Tensor | None = None,
        eps: float = 0.0,
        activation: str = "none",
        residual: Tensor | None = None,
    ) -> None:
        sizes = [len(weight) for weight in weights] + [0] * (MOST_LAYERS - len(weights))
        launch = launch_of(x.shape[-1], gated=activation != "none")
        computed = sizes[:1] if activation != "none" else sizes
        self.module.linear[(sum(-(-size // launch["ROWS"]) for size in computed),)](
            x.contiguous(),
            x if norm is None else norm,
            *_three(weights),
            *_three(biases or weights),
            x if residual is None else residual.contiguous(),
            *_three(out),
            eps,
            K=x.shape[-1],
            N0=sizes[0],
            N1=sizes[1],
            N2=sizes[2],
            NORM=norm is not None,
            BIAS=biases is not None,
            ADD=residual is not None,
            ACTIVATION=activation,
            **launch,
            **overlap(self.module, x.device),
        )


def is_one_token(x: Tensor) -> bool:
    return x.numel() == x.shape[-1]


def launch_of(columns: int, gated: bool) -> dict[str, int]:
    """Constants and options of the kernel of one token, for weights with so many columns. Measured on an H200."""
    wide = columns > MANY_COLUMNS and not gated
    rows, step, warps, unrolled = (4, 512, 4, 4) if wide else (2, 2048, 8, 2)
    step = min(step, power_of_two(columns))
    return {"ROWS": rows, "STEP": step, "UNROLLED": unrolled, "num_warps": min(warps, max(1, step // 128))}


def power_of_two(count: int) -> int:
    """The smallest power of two from `count` up."""
    return 1 << (count - 1).bit_length()


def _three(tensors: Sequence[Any]) -> list[Any]:
    """The kernel's three pointers, of which it reads those that stand for something."""
    return [*tensors, *[tensors[0]] * (MOST_LAYERS - len(tensors))]
