"""Attention by the library: PyTorch's own kernels, which return the logarithm of the weights' sum beside the result."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


@lru_cache
def library_has(device: torch.device, key_head_dim: int, value_head_dim: int) -> bool:
    """Whether the library has attention for heads of these channels on a device; "meta" stands for one where it has."""
    if device.type != "cuda":
        return True
    heads = [
        torch.empty(1, 1, 64, channels, dtype=torch.float16, device=device)
        for channels in (key_head_dim, value_head_dim)
    ]
    params = torch.backends.cuda.SDPAParams(heads[0], heads[0], heads[1], None, 0.0, False, True)
    return bool(torch.backends.cuda.can_use_cudnn_attention(params))


def library_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool = False) -> tuple[Tensor, Tensor]:
    """Attention of queries `q` [1, Hq, S, dk] over keys `k` [1, Hkv, T, dk] and `v` [1, Hkv, T, dv]: the means of the
    values [Hq, S, dv] and the natural logarithms of the weights' sums [Hq, S] (float32).

    Every query sees all keys or, where it is `causal`, those up to the one at its own place.
    """
    if q.device.type == "cpu":
        attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out, log_sums = attention(q, k, v, is_causal=causal, scale=scale)
    else:
        attention = torch.ops.aten._scaled_dot_product_cudnn_attention
        out, log_sums = attention(q, k, v, None, compute_log_sumexp=True, is_causal=causal, scale=scale)[:2]
    return out[0].contiguous(), log_sums[0].reshape(out.shape[1:3]).contiguous()
