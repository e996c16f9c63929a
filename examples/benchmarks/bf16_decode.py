"""Decode attention over a plain bf16 cache: the Triton kernel that the packed ones are compared with.

It splits the tokens among programs and takes one softmax per tile. The memory limits its speed.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def split_kernel(
    queries, keys, values, partial, log_weights, tokens, splits, scale,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    head, split = tl.program_id(0), tl.program_id(1)
    g = tl.arange(0, 16)
    channel = tl.arange(0, HEAD_DIM)
    real = (g < GROUP)[:, None]
    q = tl.load(queries + (head * GROUP + g)[:, None] * HEAD_DIM + channel[None, :], mask=real, other=0.0)
    keys += head.to(tl.int64) * tokens * HEAD_DIM
    values += head.to(tl.int64) * tokens * HEAD_DIM
    tiles = tl.cdiv(tokens, TILE)
    m = tl.full([16], float("-inf"), tl.float32)
    weight = tl.zeros([16], tl.float32)
    acc = tl.zeros([16, HEAD_DIM], tl.float32)
    for tile in range(split * tiles // splits, (split + 1) * tiles // splits):
        token = tile * TILE + tl.arange(0, TILE)
        at = token[:, None] * HEAD_DIM + channel[None, :]
        k = tl.load(keys + at, mask=(token < tokens)[:, None], other=0.0)
        y = tl.dot(q, tl.trans(k)) * (scale * 1.4426950408889634)
        y = tl.where((token < tokens)[None, :], y, float("-inf"))
        new = tl.maximum(m, tl.max(y, 1))
        p = tl.exp2(y - new[:, None])
        rescale = tl.exp2(m - new)
        weight = weight * rescale + tl.sum(p, 1)
        v = tl.load(values + at, mask=(token < tokens)[:, None], other=0.0)
        acc = tl.dot(p.to(v.dtype), v, acc * rescale[:, None])
        m = new
    at = (head * splits + split) * GROUP + g
    tl.store(partial + at[:, None] * HEAD_DIM + channel[None, :], acc / weight[:, None], mask=real)
    tl.store(log_weights + at, m + tl.log2(weight), mask=g < GROUP)


@triton.jit
def merge_kernel(
    partial, log_weights, out, splits, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, SPLITS_PADDED: tl.constexpr
):
    head, g = tl.program_id(0), tl.program_id(1)
    split = tl.arange(0, SPLITS_PADDED)
    channel = tl.arange(0, HEAD_DIM)
    at = (head * splits + split) * GROUP + g
    logs = tl.load(log_weights + at, mask=split < splits, other=float("-inf"))
    weight = tl.exp2(logs - tl.max(logs, 0))
    mask = (split < splits)[:, None]
    means = tl.load(partial + at[:, None] * HEAD_DIM + channel[None, :], mask=mask, other=0.0)
    mean = tl.sum(means * weight[:, None], 0) / tl.sum(weight, 0)
    tl.store(out + (head * GROUP + g) * HEAD_DIM + channel, mean.to(out.dtype.element_ty))


def bf16_decode(q: Tensor, k: Tensor, v: Tensor, splits: int, tile: int, warps: int, stages: int) -> Tensor:
    """Attention of `q` [B, Hq, 1, d] over `k`, `v` [B, Hkv, T, d], all contiguous."""
    batch, query_heads, _, head_dim = q.shape
    heads, group = batch * k.shape[1], query_heads // k.shape[1]
    splits = min(splits, triton.cdiv(k.shape[2], tile))  # an empty one would be merged as a NaN
    partial = torch.empty(heads, splits, group, head_dim, dtype=torch.float32, device=q.device)
    log_weights = torch.empty(heads, splits, group, dtype=torch.float32, device=q.device)
    out = torch.empty_like(q)
    split_kernel[(heads, splits)](
        q, k, v, partial, log_weights, k.shape[2], splits, head_dim**-0.5, group, head_dim, tile,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    padded = triton.next_power_of_2(splits)
    merge_kernel[(heads, group)](partial, log_weights, out, splits, group, head_dim, padded)
    return out
