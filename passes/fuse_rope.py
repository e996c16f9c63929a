"""Turn the rotary position embedding of queries and keys into one op."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from pmkvq_compiler.runtime import fused

from .base import Pass
from .ops import only_reader, replace_together
from .outline_layers import layer_module
from .program import Program
from .verify import Stage

aten = torch.ops.aten

MOST_TENSORS = 2
"""Tensors that one op turns: queries and keys."""


class FuseRope(Pass):
    """Replace rotary position embeddings by `rope`, which a CUDA device runs as one kernel.

    1. `x * cos + cat([-x[..., d/2:], x[..., :d/2]], -1) * sin`, with x [B, H, S, d] and `cos` and `sin` [B, 1, S, d] in
       one dtype and d even, becomes `rope([x], cos, sin)[0]`. Products may have their factors in either order.
    2. Two of these in a row with the same `cos` and `sin` in one layer become one op, if the first is not read before
       the second is computed.
    3. Everything else stays as it is: other pairs of channels, parts of the channels, and those with a value in between
       that another op reads.
    """

    takes = Stage.CANONICAL
    leaves = Stage.CANONICAL

    def run(self, program: Program) -> bool:
        alike: dict[tuple[Node, Node, str | None], list[Turned]] = {}
        for node in program.graph.nodes:
            found = _match(node)
            if found is not None:
                alike.setdefault((found.cos, found.sin, layer_module(node)), []).append(found)
        for every in alike.values():
            for group in _groups(every):
                _replace(group)
        program.graph.eliminate_dead_code()
        return bool(alike)


@dataclass(frozen=True)
class Turned:
    """`result` is `operand`, turned by the tables `cos` and `sin`."""

    result: Node
    operand: Node
    cos: Node
    sin: Node


def _match(node: Node) -> Turned | None:
    """The embedding that ends with `node`, or None."""
    if node.target is not aten.add.Tensor or node.kwargs or len(node.all_input_nodes) != 2:
        return None
    for plain, crossed in itertools.permutations(node.args):
        for (x, cos), (half, sin) in itertools.product(_factors(plain, node), _factors(crossed, node)):
            if _is_half_turn(half, x, crossed) and _fits(x, cos, sin, node):
                return Turned(node, x, cos, sin)
    return None


def _factors(product: Node, reader: Node) -> list[tuple[Node, Node]]:
    """The factors of a product that only `reader` reads, in both orders; none for any other node."""
    fits = product.target is aten.mul.Tensor and only_reader(product) is reader
    factors: list[Any] = [one for one in product.args if isinstance(one, Node)] if fits else []
    return list(itertools.permutations(factors, 2))


def _is_half_turn(node: Node, x: Node, reader: Node) -> bool:
    """Whether a node that only `reader` reads is `cat([-x[..., d/2:], x[..., :d/2]], -1)`."""
    last, channels = x.meta["val"].dim() - 1, x.meta["val"].shape[-1]
    if node.target is not aten.cat.default or only_reader(node) is not reader or node.args[1:] not in ((-1,), (last,)):
        return False
    minus, *others = node.args[0]
    if len(others) != 1 or minus.target is not aten.neg.default or only_reader(minus) is not node:
        return False
    upper, lower = _bounds(minus.args[0], minus, x), _bounds(others[0], node, x)
    return (lower, upper) == ((0, channels // 2), (channels // 2, channels))


def _bounds(part: Node, reader: Node, x: Node) -> tuple[int, int] | None:
    """The first and the last channel of `x` that `part` has, if it is such a part and only `reader` reads it."""
    if part.target is not aten.slice.Tensor or len(part.args) != 4 or only_reader(part) is not reader:
        return None
    whole, dim, start, end = part.args
    value = x.meta["val"]
    return (start, min(end, value.shape[-1])) if whole is x and dim in (-1, value.dim() - 1) else None


def _fits(x: Node, cos: Node, sin: Node, result: Node) -> bool:
    """Whether shapes and dtypes are those of the op."""
    value, tables = x.meta["val"], [cos.meta["val"], sin.meta["val"]]
    if value.dim() != 4 or isinstance(value.shape[-1], torch.SymInt) or value.shape[-1] % 2:
        return False
    return all(
        table.dim() == 4
        and table.dtype == value.dtype == result.meta["val"].dtype
        and table.shape[1] == 1
        and [str(size) for size in table.shape[2:]] == [str(size) for size in value.shape[2:]]
        for table in tables
    )


def _groups(every: list[Turned]) -> Iterator[list[Turned]]:
    """Divide embeddings with the same tables, in the order of the graph, into those that one op computes."""
    while every:
        count = MOST_TENSORS
        while any(reader < every[:count][-1].result for one in every[:count] for reader in one.result.users):
            count -= 1  # a result is read before the last one can be computed
        yield every[:count]
        every = every[count:]


def _replace(every: Sequence[Turned]) -> None:
    """Put one op in the place of embeddings with the same tables."""
    results, operands = [one.result for one in every], [one.operand for one in every]
    replace_together(results, results[-1], fused.rope, (operands, every[0].cos, every[0].sin))
