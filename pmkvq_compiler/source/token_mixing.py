"""What else than attention mixes tokens in a captured graph: known ops with a state, or something that is refused."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import SymInt
from torch._ops import OpOverload
from torch.fx import Graph, Node

from pmkvq_compiler.errors import CompileError
from pmkvq_compiler.passes.ops import MARKER, STATE_OPS, state_markers, state_plan
from pmkvq_compiler.passes.outline_layers import layer_module
from pmkvq_compiler.runtime.plan import StatePlan

aten = torch.ops.aten

ALONG = {
    aten.cumsum.default: 1,
    aten.cumprod.default: 1,
    aten.flip.default: 1,
    aten.logcumsumexp.default: 1,
    aten.roll.default: 2,
    aten.softmax.int: 1,
    aten.sort.default: 1,
}
"""Ops that mix the elements of dimensions but keep the shape, and the place of the dimensions among their arguments."""


def number_states(graph: Graph, model_type: str) -> tuple[StatePlan, ...]:
    """Write the layer and the number of each state into its marker; returns the states. Raises `CompileError` where
    the layers of a model are not the elements of a list."""
    counts: Counter[int] = Counter()
    for marker in state_markers(graph):
        owner = layer_module(marker)
        if owner is None:
            raise CompileError(
                f"{model_type} keeps a recurrent state outside of its layers ({marker.name}), which the cache cannot "
                f"represent; choose another model"
            )
        layer = int(owner.rpartition(".")[2])
        marker.args = (*marker.args[:-2], layer, counts[layer])
        counts[layer] += 1
    return tuple(state_plan(marker) for marker in state_markers(graph))


def check_mixing(graph: Graph, model_type: str, sequence: SymInt) -> None:
    """Raises `CompileError` if an op that is no marker mixes tokens, whose number is `sequence`: it would need a state
    that nobody keeps."""
    symbol, read = sequence.node.expr, _read_nodes(graph)
    for node in graph.nodes:
        if node.op != "call_function" or node not in read or node.target is MARKER or node.target in STATE_OPS:
            continue
        if "conv" in str(node.target) or _mixes(node, symbol):
            raise CompileError(
                f"{model_type} mixes tokens outside of attention ({node.target}), whose state a KV cache cannot hold; "
                f"choose another model"
            )


def _read_nodes(graph: Graph) -> set[Node]:
    """The nodes that the graph's output is computed from, or that change something in place."""
    waiting = [node for node in graph.nodes if node.op == "output" or _is_mutable(node)]
    read = set(waiting)
    while waiting:
        for operand in waiting.pop().all_input_nodes:
            if operand not in read:
                read.add(operand)
                waiting.append(operand)
    return read


def _is_mutable(node: Node) -> bool:
    return isinstance(node.target, OpOverload) and node.target._schema.is_mutable


def _mixes(node: Node, symbol: Any) -> bool:
    """Whether an op shifts tokens, pairs them with each other, chooses among them, or sums over them."""
    each_token = any(symbol in _sizes(operand.meta.get("val")) for operand in node.all_input_nodes)
    values = node.meta.get("val")
    for value in values if isinstance(values, (list, tuple)) else [values]:
        if isinstance(value, torch.Tensor):
            counts = [size for size in _sizes(value) if _depends(size, symbol)]
            if len(counts) > 1 or any(_depends(count / symbol, symbol) for count in counts):
                return True
            if each_token and not counts:
                return True
    place = ALONG.get(node.target)
    if place is None or len(node.args) <= place:
        return False
    sizes, dims = _sizes(node.args[0].meta["val"]), node.args[place]
    return any(sizes[dim] == symbol for dim in ([dims] if isinstance(dims, int) else dims))


def _sizes(value: Any) -> list[Any]:
    """The sizes of a tensor as expressions; none for what is no tensor."""
    return [_expression(size) for size in value.shape] if isinstance(value, torch.Tensor) else []


def _expression(size: Any) -> Any:
    return size.node.expr if isinstance(size, SymInt) else size


def _depends(expression: Any, symbol: Any) -> bool:
    return hasattr(expression, "has") and bool(expression.has(symbol))
