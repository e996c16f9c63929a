"""Let the cache of latent attention hold the latent vector instead of the keys and values of every head."""

from __future__ import annotations

import operator
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node

from .base import Pass
from .locate_attention import RESHAPES, markers
from .ops import MARKER
from .program import Latent, Program
from .verify import Stage, is_assertion

aten = torch.ops.aten


class CompressLatents(Pass):
    """Rewrite multi-head latent attention, in which the keys and values of all heads come from one vector a token.

    The latent c [B, S, R] is projected to the keys (without RoPE) and the values of every head, W c. All heads share
    the part of the key that RoPE turns. So q . k = (W_K^T q) . c + q_rope . k_rope, and the sum of values is W_V times
    the sum of latents.

    1. The marker gets one key head, which is c and the turned part, and one value head, which is c.
    2. Each query head is multiplied by its W_K^T, and each head of the result by its W_V.
    3. A marker is left alone if its operands do not match exactly, or if the latent would not take less memory.
    """

    takes = Stage.CAPTURED
    leaves = Stage.CAPTURED

    def run(self, program: Program) -> bool:
        found = latents(program)
        for marker, operands in found.items():
            _rewrite(marker, operands, program)
        return bool(found)


@dataclass(frozen=True)
class Operands:
    """The latent and the turned part of the key [B, 1, S, ...], the weight [heads * (key + value), R], the channels of
    a key without RoPE and of a value, and in-place copies that made the key."""

    latent: Node
    turned: Node
    weight: Node
    key_dim: int
    value_dim: int
    copies: tuple[Node, ...]


def latents(program: Program) -> dict[Node, Operands]:
    """The markers of latent attention that are worth rewriting."""
    found = {marker: _match(marker, program) for marker in markers(program.graph)}
    return {marker: operands for marker, operands in found.items() if operands is not None}


def _match(marker: Node, program: Program) -> Operands | None:
    _, key, value = marker.args[:3]
    parts, copies = _key_parts(key, marker)
    if len(parts) != 2 or parts[1].target is not aten.expand.default:
        return None
    nope, turned = parts[0], parts[1].args[0]
    split = nope.args[0] if nope.target is operator.getitem else None
    if split is None or split.target is not aten.split_with_sizes.default or value.target is not operator.getitem:
        return None
    if value.args != (split, 1) or nope.args[1] != 0 or len(split.args[1]) != 2 or split.args[2] not in (-1, 3):
        return None
    linear = _through_heads(split.args[0])
    if linear is None or len([one for one in linear.args if one is not None]) != 2:
        return None
    latent, weight = linear.args[:2]
    heads, rank, turned_dim = key.meta["val"].shape[1], latent.meta["val"].shape[-1], turned.meta["val"].shape[-1]
    numbers = heads * (key.meta["val"].shape[-1] + value.meta["val"].shape[-1])
    is_shared = turned.meta["val"].shape[1] == 1 and latent.meta["val"].dim() in (3, 4)
    if weight.name not in program.weights or not is_shared or 2 * rank + turned_dim >= numbers:
        return None
    key_dim, value_dim = split.args[1]
    return Operands(latent, turned, weight, key_dim, value_dim, copies)


def _key_parts(key: Node, marker: Node) -> tuple[list[Node], tuple[Node, ...]]:
    """What a key was put together from: by `cat`, or by copies into an empty tensor."""
    if key.target is aten.cat.default and key.args[1:] in ((-1,), (3,)):
        return list(key.args[0]), ()
    if key.target is not aten.new_empty.default:
        return [], ()
    slices = [user for user in key.users if user is not marker and not is_assertion(user)]
    copies = [user for part in slices for user in part.users if user.target is aten.copy_.default]
    if len(copies) != len(slices) or any(part.target is not aten.slice.Tensor for part in slices):
        return [], ()
    return [copy.args[1] for copy in copies], tuple(copies)


def _through_heads(node: Node) -> Node | None:
    """The linear layer whose output was split into heads [B, heads, S, channels]."""
    while node.target in RESHAPES:
        node = node.args[0]
    return node if node.target is aten.linear.default else None


def _rewrite(marker: Node, operands: Operands, program: Program) -> None:
    query, key, _, *rest = marker.args
    heads, key_dim = query.meta["val"].shape[1], operands.key_dim
    make = _Maker(marker)
    weights = make(aten.view.default, operands.weight, [heads, key_dim + operands.value_dim, -1])
    to_latent = make(aten.slice.Tensor, weights, 1, 0, key_dim)
    absorbed = make(aten.matmul.default, make(aten.slice.Tensor, query, 3, 0, key_dim), to_latent)
    turned_query = make(aten.slice.Tensor, query, 3, key_dim, sys.maxsize)
    latent = operands.latent
    if latent.meta["val"].dim() == 3:
        latent = make(aten.unsqueeze.default, latent, 1)
    queries = make(aten.cat.default, [absorbed, turned_query], -1)
    keys = make(aten.cat.default, [latent, operands.turned], -1)
    attended = make(MARKER, queries, keys, latent, *rest)
    attended.kwargs = dict(marker.kwargs)
    from_latent = make(aten.transpose.int, make(aten.slice.Tensor, weights, 1, key_dim, sys.maxsize), 1, 2)
    out = make(aten.matmul.default, attended, from_latent)
    attended.meta["latent"] = Latent(program.weights[operands.weight.name], heads, key_dim, operands.value_dim)
    marker.replace_all_uses_with(out)
    graph: Graph = marker.graph
    graph.erase_node(marker)
    for copy in operands.copies:
        part = copy.args[0]
        graph.erase_node(copy)
        graph.erase_node(part)
    if operands.copies:
        graph.erase_node(key)


class _Maker:
    """Adds ops before a node, as part of that node's module, with their shapes and dtypes."""

    def __init__(self, place: Node) -> None:
        self.place = place

    def __call__(self, target: Any, *args: Any) -> Node:
        with self.place.graph.inserting_before(self.place):
            node: Node = self.place.graph.call_function(target, args)
        values = torch.fx.node.map_arg(args, lambda one: one.meta["val"])
        with self.place.meta["val"].fake_mode:
            node.meta = {**self.place.meta, "val": target(*values)}
        return node
