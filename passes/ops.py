"""Ops that several passes look for, among them the markers that the capture leaves and the ops that replace them."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import Graph, Node

from pmkvq_compiler.runtime import fused, recurrence
from pmkvq_compiler.runtime.attention import cached_attention as run_cached_attention
from pmkvq_compiler.runtime.cache import Cache
from pmkvq_compiler.runtime.plan import LayerPlan, StatePlan


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


@torch.library.custom_op("pmkvq::causal_conv1d", mutates_args=())
def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor | None, layer: int, index: int) -> Tensor:
    """Marks one causal convolution of each channel by itself; see `runtime.recurrence`, as for the next two."""
    raise NotImplementedError("pmkvq::causal_conv1d marks a place in a captured graph and cannot be run")


@causal_conv1d.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, layer: int, index: int) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("pmkvq::gated_delta_rule", mutates_args=())
def gated_delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    decay: Tensor,
    beta: Tensor,
    scale: float,
    normalize: bool,
    layer: int,
    index: int,
) -> Tensor:
    """Marks one linear attention by the gated delta rule."""
    raise NotImplementedError("pmkvq::gated_delta_rule marks a place in a captured graph and cannot be run")


@gated_delta_rule.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    decay: Tensor,
    beta: Tensor,
    scale: float,
    normalize: bool,
    layer: int,
    index: int,
) -> Tensor:
    return query.new_empty(value.shape)


@torch.library.custom_op("pmkvq::selective_scan", mutates_args=())
def selective_scan(x: Tensor, step: Tensor, rate: Tensor, key: Tensor, query: Tensor, layer: int, index: int) -> Tensor:
    """Marks one state-space scan of Mamba."""
    raise NotImplementedError("pmkvq::selective_scan marks a place in a captured graph and cannot be run")


@selective_scan.register_fake
def _(x: Tensor, step: Tensor, rate: Tensor, key: Tensor, query: Tensor, layer: int, index: int) -> Tensor:
    return x.new_empty(x.shape, dtype=torch.float32)


aten = torch.ops.aten
CASTS = frozenset({aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten.type_as.default})
MARKER = torch.ops.pmkvq.attention.default
CONVOLUTION = torch.ops.pmkvq.causal_conv1d.default
DELTA_RULE = torch.ops.pmkvq.gated_delta_rule.default
SCAN = torch.ops.pmkvq.selective_scan.default

STATE_OPS: dict[OpOverload, Callable[..., Tensor]] = {
    CONVOLUTION: recurrence.causal_conv1d,
    DELTA_RULE: recurrence.gated_delta_rule,
    SCAN: recurrence.selective_scan,
}
"""The markers of ops that carry a state from token to token, and the runtime's functions. A marker's last two arguments
are the index of its layer and that of its state among the layer's states. The function takes the cache before these."""

MERGED_OPS = frozenset({fused.linears, fused.gated_linear})
"""Ops that are given lists of weights and of biases, after their input."""

FUSED_OPS = MERGED_OPS | {fused.linear_add, fused.rope}
"""Ops that passes make of several others."""


def state_markers(graph: Graph) -> list[Node]:
    """The markers of ops with a state, in their order."""
    return [node for node in graph.nodes if node.op == "call_function" and node.target in STATE_OPS]


def state_shape(marker: OpOverload, operands: Sequence[Any]) -> tuple[int, ...]:
    """The shape of the state of one sequence that the op of a `marker` carries, by the op's operands."""
    if marker is CONVOLUTION:
        channels, width = operands[1].shape
        return channels, width - 1
    inputs, keys = (operands[2], operands[1]) if marker is DELTA_RULE else (operands[0], operands[3])
    return inputs.shape[2], keys.shape[3], inputs.shape[3]


def state_plan(marker: Node) -> StatePlan:
    """The state that the op of a marker carries."""
    *operands, layer, index = marker.args
    values = [one.meta["val"] if isinstance(one, Node) else one for one in operands]
    return StatePlan(layer, index, state_shape(marker.target, values), float32=marker.target is not CONVOLUTION)


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


def uses_cache(node: Node) -> bool:
    """Whether the node is an attention, or another op with a state, that takes the cache as an operand."""
    return node.target is cached_attention or node.target in STATE_OPS.values()


def layer_place(node: Node) -> int:
    """The place of the layer's index among the arguments of a node that uses the cache: after the cache."""
    return 4 if node.target is cached_attention else len(node.args) - 2


def only_reader(node: Node) -> Node | None:
    """The one node that reads a value; None if there are more or none."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def same_form(one: Node, other: Node) -> bool:
    """Whether two values have the same shape and dtype."""
    first, second = one.meta["val"], other.meta["val"]
    return first.dtype == second.dtype and list(map(str, first.shape)) == list(map(str, second.shape))


def call_before(place: Node, function: Callable[..., Any], args: tuple[Any, ...], like: Node, value: Any) -> Node:
    """A call of `function` in front of the node `place`: with the result `value`, in the module of the node `like`."""
    with place.graph.inserting_before(place):
        node = place.graph.call_function(function, args)
    node.meta = {**like.meta, "val": value}
    return node


def replace_together(results: Sequence[Node], place: Node, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    """Put one call of `function`, in front of the node `place`, where each of the `results` was computed by itself."""
    together = call_before(place, function, args, place, tuple(one.meta["val"] for one in results))
    for index, one in enumerate(results):
        one.replace_all_uses_with(call_before(place, operator.getitem, (together, index), one, one.meta["val"]))
