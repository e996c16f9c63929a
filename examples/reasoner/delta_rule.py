"""The gated delta rule of transformers' models with a fast backward pass, to train the hybrid with.

transformers takes chunks of a text by indexing, and the gradient of each index is a tensor of the whole text's size.
Here all chunks are unbound at once. Chunks are longer, too, so that there are fewer of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.models.qwen3_5 import modeling_qwen3_5

CHUNK = 128
"""Tokens of a chunk. The lengths of texts are multiples of it."""
NORM_EPS = 1e-6


def chunked_delta_rule(
    query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor, **others: Any
) -> tuple[Tensor, None]:
    """S = exp(g) S + k (beta (v - k exp(g) S)), out = q S / sqrt(d), from S = 0, in float32.

    `query`, `key` and `value` are [B, S, H, d], `g` and `beta` [B, S, H]; queries and keys are divided by their norms.
    """
    with torch.autocast(query.device.type, enabled=False):
        tokens = (query, key, value, g.unsqueeze(-1), beta.unsqueeze(-1))
        q, k, v, decay, rate = (x.float().transpose(1, 2).unflatten(2, (-1, CHUNK)) for x in tokens)
        q, k = (x * torch.rsqrt(x.square().sum(-1, keepdim=True) + NORM_EPS) for x in (q, k))
        q = q * q.shape[-1] ** -0.5
        cumulative = decay.cumsum(3)  # [B, H, chunks, CHUNK, 1]
        future = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=q.device).triu(1)
        decays = (cumulative - cumulative.mT).masked_fill(future, float("-inf")).exp()
        system = (k * rate) @ k.mT * decays
        read, written = (
            torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
            for right in (k * rate * cumulative.exp(), v * rate)
        )
        last = cumulative[..., -1:, :]
        chunks = (
            q * cumulative.exp(),
            q @ k.mT * decays,
            (k * (last - cumulative).exp()).mT,
            read,
            written,
            last.exp(),
        )
        state, outs = torch.zeros_like(chunks[2][:, :, 0] @ v[:, :, 0]), []
        for q_now, products, keys, reads, writes, left in zip(*(x.unbind(2) for x in chunks), strict=True):
            new = writes - reads @ state
            outs.append(q_now @ state + products @ new)
            state = left * state + keys @ new
        return torch.stack(outs, dim=2).flatten(2, 3).transpose(1, 2).to(query.dtype), None


@contextmanager
def fast_delta_rule() -> Iterator[None]:
    """Within, Qwen3.5's layers call `chunked_delta_rule`."""
    own = modeling_qwen3_5.torch_chunk_gated_delta_rule
    modeling_qwen3_5.torch_chunk_gated_delta_rule = chunked_delta_rule
    try:
        yield
    finally:
        modeling_qwen3_5.torch_chunk_gated_delta_rule = own
