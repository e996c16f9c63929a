"""Operations that carry a state from token to token: a short convolution and two linear recurrences.

Each reads its state from the cache and leaves there the state after the new tokens. Columns that are padding do not
change a state, and their results mean nothing.

A library computes the recurrences where it can (`linear_attention`). The reference is plain PyTorch. It takes the
tokens in chunks: within a chunk a triangle of decayed products stands for the steps from token to token, and between
chunks there is only the state. A chunk of one token is the plain recurrence.

Below, a state is a matrix S [keys, values] for each head, `a` the decay of a token, and `cumulative` the sum of the
logarithms of the decays from the beginning of the chunk.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .backend import Attention
from .cache import Cache
from .linear_attention import Rule, library_for, rule_for
from .reference import REFERENCE

CHUNK = 64
"""Tokens of a chunk, at most."""
PRODUCTS = 1 << 18
"""Numbers that the products of a chunk may take if every channel of a key decays by itself. Chunks are shorter then: a
token's share of the work grows with the chunk."""
NORM_EPS = 1e-6


def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor | None, cache: Cache, layer: int, index: int) -> Tensor:
    """Convolve each channel of `x` [B, C, S] with `weight` [C, K] over the present and the K - 1 tokens before.

    The state [B, C, K - 1] holds the last inputs. The result is [B, C, S].
    """
    kept, width, new = weight.shape[1] - 1, x.shape[2], cache.new_tokens
    joined = torch.cat([cache.states.read(layer, index).to(x.dtype), x], dim=-1)
    if new.fill(width):
        last = joined[..., width:]
    else:
        starts, counts = (bound.unsqueeze(-1) for bound in new.bounds(x.device))
        columns = torch.arange(kept + width, device=x.device) - starts  # [B, kept + S], 0 where the state belongs
        before = (columns >= 0) & (columns < kept)
        joined = _gather(joined, torch.where(before, columns, columns + starts))
        last = _gather(joined, starts + counts + torch.arange(kept, device=x.device))
    cache.states.write(layer, index, last)
    return F.conv1d(joined, weight.unsqueeze(1), bias, groups=x.shape[1])


def _gather(x: Tensor, columns: Tensor) -> Tensor:
    """The `columns` [B, n] of `x` [B, C, S]."""
    return x.gather(-1, columns.unsqueeze(1).expand(-1, x.shape[1], -1))


def gated_delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    decay: Tensor,
    beta: Tensor,
    scale: float,
    normalize: bool,
    cache: Cache,
    layer: int,
    index: int,
) -> Tensor:
    """Linear attention by the gated delta rule: S = a S + k (beta (v - k a S)), out = scale q S.

    `query` and `key` are [B, S, Hk, dk], `value` [B, S, Hv, dv], `beta` [B, S, Hv]. `decay` is log a, [B, S, Hv] or, if
    every channel of a key decays by itself, [B, S, Hv, dk]. Each key head serves Hv / Hk value heads. With `normalize`,
    queries and keys are divided by their norms. The state is [B, Hv, dk, dv] in float32, and so are all computations.
    The result is [B, S, Hv, dv] in the dtype of `query`.
    """
    decay, beta = (_only_tokens(x, cache) for x in (decay, beta))
    operands = query, key, value, decay, beta, scale, normalize, cache.states.read(layer, index)
    out, state = _rule("delta_rule", _delta_rule, operands, cache)(*operands)
    cache.states.write(layer, index, state)
    return out


def selective_scan(
    x: Tensor, step: Tensor, rate: Tensor, key: Tensor, query: Tensor, cache: Cache, layer: int, index: int
) -> Tensor:
    """The state-space scan of Mamba (1 and 2): S = exp(step rate) S + k (step x), out = q S.

    `x` is [B, S, H, P], `step` [B, S, H], `key` and `query` (B and C in the papers) [B, S, G, N], each for H / G heads.
    `rate` is [H] or, if every channel of the state decays by itself, [H, N]. The state is [B, H, N, P] in float32, and
    so are all computations. The result is [B, S, H, P] in float32.
    """
    operands = x, _only_tokens(step, cache), rate, key, query, cache.states.read(layer, index)
    by_channel = rate.dim() == 2  # Mamba 1, which the library does not have
    out, state = (_scan if by_channel else _rule("scan", _scan, operands, cache))(*operands)
    cache.states.write(layer, index, state)
    return out


def computed_by(shape: Sequence[int], dtype: torch.dtype, device: torch.device, attention: Sequence[Attention]) -> str:
    """What computes the recurrences of a model in `dtype` on `device` whose states have this `shape`: "reference", or
    the library and its version. `attention` says whether the model was asked for plain PyTorch."""
    library = None if _is_plain(attention) else library_for(shape, dtype, device)
    return REFERENCE.name if library is None else library.name


def _rule(name: str, reference: Rule, operands: tuple[Any, ...], cache: Cache) -> Rule:
    return reference if _is_plain(cache.attention) else rule_for(name, reference, operands)


def _is_plain(attention: Sequence[Attention]) -> bool:
    """Whether a model was asked to compute everything in plain PyTorch."""
    return all(one is REFERENCE for one in attention)


# ---- the reference ----


def _delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    decay: Tensor,
    beta: Tensor,
    scale: float,
    normalize: bool,
    state: Tensor,
) -> tuple[Tensor, Tensor]:
    """`gated_delta_rule` of columns that are all tokens, and the state after them."""
    compute, heads = torch.promote_types(query.dtype, torch.float32), value.shape[2]
    q, k = (_repeated(x.to(compute), heads) for x in (query, key))
    if normalize:
        q, k = (x * torch.rsqrt((x * x).sum(-1, keepdim=True) + NORM_EPS) for x in (q, k))
    q, k, v = (x.transpose(1, 2) for x in (q * scale, k, value.to(compute)))
    decay = decay.to(compute).reshape(*decay.shape[:3], -1).transpose(1, 2)
    beta, state = beta.to(compute).unsqueeze(-1).transpose(1, 2), state.to(compute)
    parts = []
    for part in _chunks(k, decay):
        cumulative = decay[:, :, part].cumsum(2)
        keys, weighted = k[:, :, part], k[:, :, part] * beta[:, :, part]
        read = weighted * cumulative.exp()
        values = v[:, :, part] * beta[:, :, part]
        if keys.shape[2] > 1:  # each token also reads what those before it in the chunk have written
            system = _decayed_products(weighted, keys, cumulative)
            read, values = _solved(system, read), _solved(system, values)
        out, state = _step(q[:, :, part], keys, values - read @ state, cumulative, state)
        parts.append(out)
    return torch.cat(parts, dim=2).transpose(1, 2).contiguous().to(query.dtype), state


def _scan(x: Tensor, step: Tensor, rate: Tensor, key: Tensor, query: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """`selective_scan` of columns that are all tokens, and the state after them."""
    compute, heads = torch.promote_types(x.dtype, torch.float32), x.shape[2]
    q, k = (_repeated(one.to(compute), heads).transpose(1, 2) for one in (query, key))
    steps = step.to(compute).unsqueeze(-1).transpose(1, 2)
    v = x.to(compute).transpose(1, 2) * steps
    decay, state = steps * rate.to(compute).reshape(heads, 1, -1), state.to(compute)
    parts = []
    for part in _chunks(k, decay):
        out, state = _step(q[:, :, part], k[:, :, part], v[:, :, part], decay[:, :, part].cumsum(2), state)
        parts.append(out)
    return torch.cat(parts, dim=2).transpose(1, 2).contiguous(), state


def _repeated(x: Tensor, heads: int) -> Tensor:
    """`x` [B, S, G, d] for `heads` heads, of which neighbours share a group."""
    return x if x.shape[2] == heads else x.repeat_interleave(heads // x.shape[2], dim=2)


def _only_tokens(x: Tensor, cache: Cache) -> Tensor:
    """`x` [B, S, ...] with zeros in the columns that are padding: there, nothing decays and nothing is written."""
    new, width = cache.new_tokens, x.shape[1]
    if new.fill(width):
        return x
    starts, counts = (bound.unsqueeze(-1) for bound in new.bounds(x.device))
    columns = torch.arange(width, device=x.device) - starts
    tokens = (columns >= 0) & (columns < counts)
    return x.masked_fill(~tokens.reshape(*tokens.shape, *[1] * (x.dim() - 2)), 0.0)


def _chunks(key: Tensor, decay: Tensor) -> list[slice]:
    """The chunks that the tokens of `key` [B, H, S, dk] are taken in."""
    batch, heads, width, channels = key.shape
    size = CHUNK
    if decay.shape[-1] > 1:
        size = min(size, max(1, math.isqrt(PRODUCTS // (batch * heads * channels))))
    return [slice(start, start + size) for start in range(0, width, size)]


def _step(q: Tensor, k: Tensor, v: Tensor, cumulative: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """The outputs of a chunk's tokens [B, H, c, dv], which write `v` at `k`, and the state after them."""
    left = (cumulative[:, :, -1:] - cumulative).exp()
    out = (q * cumulative.exp()) @ state + _decayed_products(q, k, cumulative) @ v
    return out, cumulative[:, :, -1].exp().unsqueeze(-1) * state + (k * left).transpose(-1, -2) @ v


def _decayed_products(q: Tensor, k: Tensor, cumulative: Tensor) -> Tensor:
    """q_i . k_j [B, H, c, c] for j <= i, where k_j has decayed from token j to token i; 0 for later j."""
    future = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).triu(1).unsqueeze(-1)
    decays = (cumulative.unsqueeze(3) - cumulative.unsqueeze(2)).masked_fill(future, -math.inf).exp()
    if decays.shape[-1] == 1:
        return (q @ k.transpose(-1, -2)) * decays.squeeze(-1)
    return (q.unsqueeze(3) * k.unsqueeze(2) * decays).sum(-1)


def _solved(system: Tensor, right: Tensor) -> Tensor:
    """x with `(1 + strictly lower part of system) x = right`."""
    solution: Tensor = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
    return solution
