"""The gate before every timing: what a kernel computes is compared first, and a wrong kernel gets no time.

Attention is compared with attention in float64 over the numbers that the cache's codes stand for, and stored bits with
those that the reference path stores.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pmkvq_compiler.divergence import relative_norm
from pmkvq_compiler.runtime.layer_cache import LayerCache
from pmkvq_compiler.runtime.quantize import decode, unpack

TOLERANCE = 4e-3
"""Relative norm of an output's error. Rounding outputs to bf16 makes it 1.1e-3; probabilities in bf16 add as much."""

SAMPLE = 16
"""Queries of a chunk that are compared."""


class WrongKernelError(Exception):
    """A kernel's output is not what it must be."""


def check(what: str, found: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> None:
    """Raises `WrongKernelError` where `found` is farther from `expected` than the tolerance, or not finite."""
    error = relative_norm(found, expected)
    if not error <= tolerance:  # a NaN is not
        raise WrongKernelError(f"{what} is wrong: its relative error is {error:.1e}, and {tolerance:.1e} is allowed")


def attention(q: Tensor, keys: Tensor, values: Tensor, scale: float, visible: Tensor | None = None) -> Tensor:
    """Attention of `q` [Hq, n, dk] over `keys` [Hkv, T, dk] and `values` [Hkv, T, dv] in float64; a query sees the
    tokens of its row of `visible` [n, T]."""
    scores = torch.einsum("hgnd,htd->hgnt", q.double().unflatten(0, (len(keys), -1)), keys.double()) * scale
    if visible is not None:
        scores = scores.masked_fill(~visible, float("-inf"))
    return torch.einsum("hgnt,htd->hgnd", scores.softmax(-1), values.double()).flatten(0, 1)


def numbers(store: LayerCache, sequence: int) -> tuple[Tensor, Tensor]:
    """The keys and values [H, T, d] that a sequence has in the cache: those that its codes stand for, then its rows."""
    records, rows = store.records(sequence, 0, store.live_blocks(sequence)), store.rows[sequence]
    axis = 2 if records.key_by_channel else -1
    key_codes = unpack(records.key_codes.view(torch.int16), records.key_bits)
    value_codes = unpack(records.value_codes.view(torch.int16), records.value_bits).transpose(-1, -2)
    keys = decode(key_codes, records.key_parameters.unsqueeze(axis), records.key_bits)
    values = decode(value_codes, records.value_parameters.unsqueeze(-1), records.value_bits)
    return (
        torch.cat([keys.flatten(1, 2), store.keys[sequence, :, :rows].float()], dim=1),
        torch.cat([values.flatten(1, 2), store.values[sequence, :, :rows].float()], dim=1),
    )


def check_decode(what: str, out: Tensor, q: Tensor, store: LayerCache, scale: float) -> None:
    """`out` [B, Hq, 1, dv] is the attention of `q` [B, Hq, 1, dk] over all that every sequence has in the cache."""
    expected = [attention(one, *numbers(store, sequence), scale) for sequence, one in enumerate(q)]
    check(what, out, torch.stack(expected))


def check_chunk(
    what: str, attend: Callable[[], Tensor], q: Tensor, k: Tensor, v: Tensor, store: LayerCache, scale: float
) -> None:
    """`attend` returns the attention of a chunk of the only sequence's tokens, `q` [1, Hq, S, dk], over those in the
    cache and the chunk's own `k` and `v`, and adds these to the cache. Some of the queries are compared."""
    stored = numbers(store, 0)
    out, past, count = attend(), stored[0].shape[1], q.shape[2]
    chosen = torch.cat([torch.randint(count, (SAMPLE - 2,)), torch.tensor([0, count - 1])]).to(q.device)
    visible = torch.arange(past + count, device=q.device) <= past + chosen.unsqueeze(-1)
    keys, values = (torch.cat([old, new[0].float()], dim=1) for old, new in zip(stored, (k, v), strict=True))
    check(what, out[0, :, chosen], attention(q[0, :, chosen], keys, values, scale, visible))


def check_stored(what: str, store: LayerCache, twin: LayerCache) -> None:
    """Rows, parameters and codes of two layers are the same to the last bit."""
    same = store.counts == twin.counts
    for sequence, rows in enumerate(twin.rows if same else []):
        live = slice(0, rows)
        pairs = [(store.keys[sequence, :, live], twin.keys[sequence, :, live])]
        pairs.append((store.values[sequence, :, live], twin.values[sequence, :, live]))
        ours, theirs = (one.records(sequence, 0, one.live_blocks(sequence)) for one in (store, twin))
        for name in ("key_parameters", "value_parameters", "key_codes", "value_codes"):
            pairs.append((getattr(ours, name), getattr(theirs, name)))
        same &= all(torch.equal(one, other) for one, other in pairs)
    if not same:
        raise WrongKernelError(f"{what} is wrong: it does not store the bits of the reference path")
