"""The attention call of the generated model, which hands the work to the backend of the layer."""

from __future__ import annotations

from torch import Tensor

from .cache import Cache
from .rotation import rotate_heads


def cached_attention(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    cache: Cache,
    layer: int,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    key_rotation: Tensor | None = None,
    shared: bool = False,
) -> Tensor:
    """Causal attention of new tokens over the cached ones and themselves; the new tokens are appended to the cache.

    `q` is [B, Hq, S, key_head_dim], `k` [B, Hkv, S, key_head_dim], `v` [B, Hkv, S, value_head_dim]; `cache.begin` was
    called with the columns of each sequence that are tokens, the rest is padding. `layer` is the layer's index in the
    model. `sinks` [Hq] are logits that take part in the softmax and carry no value. `key_rotation` [Hkv, key_head_dim,
    key_head_dim] rotates queries and keys before anything else, so the cache holds rotated keys. Returns [B, Hq, S,
    value_head_dim] in the dtype of `q`; padding columns hold zeros.

    Layers may share a cache: the first of them passes `shared`, and the others pass its index as `layer` and None for
    `k` and `v`. They attend to what the first one attended to in this call of the model.
    """
    if key_rotation is not None:
        q, k = rotate_heads(q, key_rotation), None if k is None else rotate_heads(k, key_rotation)
    place = cache.places[layer]
    attention, store, new = cache.attention[place], cache.layers[place], cache.new_tokens
    if k is None or v is None:
        return attention.read(q, cache.waiting.get(place), store, new, scale, softcap, sinks)
    if not shared or q.shape[2] == 1:
        return attention.attend(q, k, v, store, new, scale, softcap, sinks)
    cache.waiting[place] = k, v
    return attention.read(q, (k, v), store, new, scale, softcap, sinks)
