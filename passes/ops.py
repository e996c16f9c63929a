"""Ops that several passes look for, among them the marker that the capture leaves and the op that replaces it."""

from __future__ import annotations

import torch
from torch import Tensor

from pmkvq_compiler.runtime.attention import cached_attention as run_cached_attention
from pmkvq_compiler.runtime.cache import Cache
from pmkvq_compiler.runtime.plan import LayerPlan


@torch.library.custom_op("pmkvq::attention", mutates_args=())
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    scale: float,
    layer: int,
    sliding_window: int,
    softcap: float,
    chunked: bool = False,
) -> Tensor:
    """Marks one causal attention in a graph. It is traced but never run.

    `q` is [B, Hq, S, key_head_dim], `k` [B, Hkv, S, key_head_dim], `v` [B, Hkv, S, value_head_dim] and `sinks` [Hq];
    `sliding_window` 0 and `softcap` 0 mean none. If `chunked`, the window does not slide: tokens come in chunks of its
    length, and a query sees those before it in its own chunk. The result is [B, Hq, S, value_head_dim] in the dtype of
    `q`.
    """
    raise NotImplementedError("pmkvq::attention marks a place in a captured graph and cannot be run")


@attention.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    scale: float,
    layer: int,
    sliding_window: int,
    softcap: float,
    chunked: bool = False,
) -> Tensor:
    return q.new_empty(*q.shape[:3], v.shape[-1])


aten = torch.ops.aten
CASTS = frozenset({aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten.type_as.default})
MARKER = torch.ops.pmkvq.attention.default


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
    plan: LayerPlan | None = None,
) -> Tensor:
    """The runtime's `cached_attention` as the target of a node. BakePlan adds `plan`, the plan of the layer's cache,
    which is not needed to run it."""
    return run_cached_attention(q, k, v, cache, layer, scale, softcap, sinks, key_rotation, shared)
