"""The reference path: attention over a layer's cache in plain PyTorch.

K and V are never restored from their codes: with x = zero + c * step, products are taken with the integer codes.

    K grouped by token    q . k_t = step_t (q . c_t) + zero_t sum(q)
    K grouped by channel  q . k_t = (q * step) . c_t + q . zero
    V grouped by token    sum_t p_t v_t = sum_t (p_t step_t) c_t + sum_t p_t zero_t

Codes are converted to floats a few blocks at a time, and not kept.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .backend import NewTokens
from .layer_cache import LayerCache, Records
from .quantize import fields_of, step_and_zero, unpack_bytes

UNPACKED_NUMBERS = 1 << 19
"""Codes unpacked at once: two megabytes of floats. Smaller chunks fit a faster CPU cache but take more calls."""

SCORES = 1 << 22
"""Scores held at once; a long prompt's queries are taken in tiles of about so many."""


class Reference:
    """`Attention` that runs wherever PyTorch does."""

    name = "reference"
    replayable = False

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        store: LayerCache,
        new: NewTokens,
        scale: float,
        softcap: float | None,
        sinks: Tensor | None,
    ) -> Tensor:
        out = q.new_zeros(*q.shape[:3], v.shape[-1])
        for sequence, own in enumerate(new.columns):
            if own.start == own.stop:
                continue
            queries, fresh = q[sequence, :, own] * scale, (k[sequence, :, own], v[sequence, :, own])
            if own.stop - own.start == 1:
                store.append(sequence, *fresh)
                out[sequence, :, own] = _attend(queries, None, store, sequence, softcap, sinks)
            else:
                out[sequence, :, own] = _attend(queries, fresh, store, sequence, softcap, sinks)
                store.append(sequence, *fresh)
        return out

    def read(
        self,
        q: Tensor,
        waiting: tuple[Tensor, Tensor] | None,
        store: LayerCache,
        new: NewTokens,
        scale: float,
        softcap: float | None,
        sinks: Tensor | None,
    ) -> Tensor:
        out = q.new_zeros(*q.shape[:3], store.plan.value_head_dim)
        for sequence, own in enumerate(new.columns):
            if own.start < own.stop:
                fresh = None if waiting is None else (waiting[0][sequence, :, own], waiting[1][sequence, :, own])
                out[sequence, :, own] = _attend(q[sequence, :, own] * scale, fresh, store, sequence, softcap, sinks)
        return out

    def append(self, k: Tensor, v: Tensor, store: LayerCache, new: NewTokens) -> None:
        for sequence, own in enumerate(new.columns):
            if own.start < own.stop:
                store.append(sequence, k[sequence, :, own], v[sequence, :, own])

    def lower(self, store: LayerCache, state: Tensor | None) -> None:
        store.lower()


REFERENCE = Reference()
"""It keeps nothing about a layer, so one object serves all layers of models that were asked for plain PyTorch."""
BESIDE_KERNELS = Reference()
"""The same in a model that was not: for layers that the kernels cannot read."""


def _attend(
    queries: Tensor,
    fresh: tuple[Tensor, Tensor] | None,
    store: LayerCache,
    sequence: int,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """One sequence: scaled `queries` [Hq, S, dk] to [Hq, S, dv]. `fresh` are the keys and values [Hkv, S, d] of their
    tokens, or None if these are in the store."""
    count, compute = queries.shape[1], torch.promote_types(queries.dtype, torch.float32)
    start = store.length(sequence) - (count if fresh is None else 0)
    grouped = queries.to(compute).unflatten(0, (store.plan.num_key_value_heads, -1))
    none = store.keys[sequence, :, :0], store.values[sequence, :, :0]
    keys, values = (x.to(compute) for x in (none if fresh is None else fresh))
    stored = store.rows[sequence] + store.live_blocks(sequence) * store.plan.block + keys.shape[1]
    tile = max(1, SCORES // (queries.shape[0] * stored))
    parts = []
    for first in range(0, count, tile):
        chunk = grouped[:, :, first : first + tile]
        visible = _visible(store, sequence, start, first, chunk.shape[2], keys.shape[1])
        parts.append(_attend_tile(chunk, keys, values, store, sequence, visible, softcap, sinks))
    return torch.cat(parts, dim=2).flatten(0, 1).to(queries.dtype)


def _visible(store: LayerCache, sequence: int, start: int, first: int, count: int, fresh: int) -> Tensor | None:
    """Mask [count, stored + fresh] of the keys that each query may see; None where all may be seen."""
    window, device = store.plan.sliding_window, store.arena.device
    if window is None and not fresh:
        return None
    own = torch.arange(start, start + fresh, device=device)
    positions = torch.cat([store.positions(sequence), own])
    queries = torch.arange(start + first, start + first + count, device=device).unsqueeze(-1)
    visible = positions <= queries
    return visible if window is None else visible & (positions >= store.plan.first_seen(queries))


def _attend_tile(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    store: LayerCache,
    sequence: int,
    visible: Tensor | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Grouped `queries` [Hkv, G, s, dk] to [Hkv, G, s, dv]: scores of pool, rows and fresh keys, one softmax,
    values."""
    heads, group, count, _ = queries.shape
    flat = queries.reshape(heads, group * count, -1)
    rows = store.rows[sequence]
    buffered_keys = store.keys[sequence, :, :rows].to(flat.dtype)
    buffered_values = store.values[sequence, :, :rows].to(flat.dtype)
    pieces = [key_scores(flat, records) for records in _chunks(store, sequence)]
    pieces.append(flat @ buffered_keys.transpose(1, 2))
    if keys.shape[1]:
        pieces.append(flat @ keys.transpose(1, 2))
    scores = torch.cat(pieces, dim=-1).unflatten(1, (group, count))
    weights = softmax(scores, visible, softcap, sinks).flatten(1, 2)
    pooled = store.live_blocks(sequence) * store.plan.block
    out: Tensor = weights[..., pooled : pooled + rows] @ buffered_values
    if keys.shape[1]:
        out += weights[..., pooled + rows :] @ values
    done = 0
    for records in _chunks(store, sequence):
        tokens = records.value_parameters.shape[1] * store.plan.block
        out += value_sums(weights[..., done : done + tokens], records)
        done += tokens
    return out.reshape(heads, group, count, -1)


def softmax(scores: Tensor, visible: Tensor | None, softcap: float | None, sinks: Tensor | None) -> Tensor:
    """Softmax over the last dimension of `scores` [Hkv, G, s, T], with soft cap, mask and sink logits."""
    if softcap is not None:
        scores = torch.tanh_(scores.div_(softcap)).mul_(softcap)
    if visible is not None:
        scores.masked_fill_(~visible, float("-inf"))
    if sinks is None:
        return torch.softmax(scores, dim=-1)
    heads, group, count, _ = scores.shape
    column = sinks.to(scores.dtype).reshape(heads, group, 1, 1).expand(-1, -1, count, 1)
    return torch.softmax(torch.cat([scores, column], dim=-1), dim=-1)[..., :-1]


def _chunks(store: LayerCache, sequence: int) -> list[Records]:
    """The live blocks of a sequence, as many at a time as should be unpacked at once."""
    plan, live = store.plan, store.live_blocks(sequence)
    block = plan.num_key_value_heads * plan.block * max(plan.key_head_dim, plan.value_head_dim)
    step = max(1, UNPACKED_NUMBERS // block)
    return [store.records(sequence, start, min(live, start + step)) for start in range(0, live, step)]


def key_scores(queries: Tensor, records: Records) -> Tensor:
    """q . k of scaled `queries` [H, R, dk] with the keys of n blocks: [H, R, n * block]."""
    heads, blocks, bits = *records.key_codes.shape[:2], records.key_bits
    codes = unpack_bytes(records.key_codes, bits, queries.dtype)
    step, zero = step_and_zero(records.key_parameters, bits)
    if records.key_by_channel:
        scaled = fields_of(queries.unsqueeze(1) * step.unsqueeze(2), bits)
        scores: Tensor = _contract(scaled.flatten(1, 2), codes.flatten(1, 2)).unflatten(0, (heads, blocks))
        offsets = queries @ zero.transpose(1, 2)
        return (scores.transpose(1, 2) + offsets.unsqueeze(-1)).flatten(2)
    scores = _contract(fields_of(queries, bits), codes.flatten(2, 3))
    total = queries.sum(-1, keepdim=True)
    return torch.addcmul(total * zero.flatten(1).unsqueeze(1), scores, step.flatten(1).unsqueeze(1))


def value_sums(weights: Tensor, records: Records) -> Tensor:
    """Sum of the values of n blocks under `weights` [H, R, n * block]: [H, R, dv]."""
    heads, blocks, bits = *records.value_codes.shape[:2], records.value_bits
    codes = unpack_bytes(records.value_codes, bits, weights.dtype)
    step, zero = step_and_zero(records.value_parameters, bits)
    scaled = (weights * step.flatten(1).unsqueeze(1)).unflatten(-1, (blocks, -1)).transpose(1, 2)
    sums: Tensor = _contract(fields_of(scaled, bits).flatten(1, 2), codes.flatten(1, 2)).unflatten(0, (heads, blocks))
    offsets = weights @ zero.flatten(1).unsqueeze(-1)
    return sums.sum(1) + offsets


def _contract(operand: Tensor, codes: Tensor) -> Tensor:
    """Product over fields and their elements: `operand` [F, B, R, w], `codes` [F, B, N, w] to [B, R, N]."""
    products = torch.bmm(operand.flatten(0, 1), codes.flatten(0, 1).transpose(1, 2))
    return products if codes.shape[0] == 1 else products.reshape(*codes.shape[:2], *products.shape[1:]).sum(0)
