"""Lets a graph take positions from `position_ids` where the model counts them itself.

Some models compute a number for each token from `arange(sequence)`, such as Llama 4's temperature of the attention.
Counted like this, the first token of every call would have position 0, whatever the cache holds.
"""

from __future__ import annotations

import torch
from torch.fx import Graph, Node

from pmkvq_compiler.passes.ops import CASTS
from pmkvq_compiler.passes.verify import is_assertion

aten = torch.ops.aten

ARANGES = frozenset(getattr(aten.arange, overload) for overload in aten.arange.overloads())
ONE_BY_ONE = frozenset(
    {
        *CASTS,
        aten.add.Tensor,
        aten.sub.Tensor,
        aten.mul.Tensor,
        aten.div.Tensor,
        aten.floor.default,
        aten.log.default,
        aten.log1p.default,
        aten.sqrt.default,
    }
)
"""Ops that compute every element from one element of their operand."""


def counted_positions(graph: Graph) -> list[Node]:
    """The ops that count the tokens of a call."""
    (input_ids,) = (node for node in graph.find_nodes(op="placeholder") if node.name == "input_ids")
    sequence = str(input_ids.meta["val"].shape[1])
    return [
        node
        for node in graph.nodes
        if node.op == "call_function" and node.target in ARANGES and str(node.meta["val"].shape[0]) == sequence
    ]


def take_positions_from_input(graph: Graph) -> None:
    """Replace counts by `position_ids` [B, S], if ops of `ONE_BY_ONE` turn them into numbers that are viewed as
    [1, S, 1, ...]. Other counts stay as they are."""
    (position_ids,) = (node for node in graph.find_nodes(op="placeholder") if node.name == "position_ids")
    for count in counted_positions(graph):
        derived = _derived(count)
        if derived is None:
            continue
        count.replace_all_uses_with(position_ids)
        graph.erase_node(count)
        for node in derived:
            if node.target is aten.view.default:
                node.update_arg(1, [-1, *node.args[1][1:]])
            operand = node.args[0].meta["val"]
            sizes = [size.meta["val"] if isinstance(size, Node) else size for size in _sizes(node)]
            with operand.fake_mode:
                rest = (sizes,) if sizes else node.args[1:]
                node.meta["val"] = node.target(operand, *rest, **node.kwargs)


def _sizes(view: Node) -> list[Node | int]:
    return list(view.args[1]) if view.target is aten.view.default else []


def _derived(count: Node) -> list[Node] | None:
    """The nodes from a count to its views, in order; None if it is used in another way."""
    found: list[Node] = []
    waiting = [count]
    while waiting:
        for user in waiting.pop().users:
            if is_assertion(user) or user in found:
                continue
            is_view = user.target is aten.view.default and user.args[1][0] == 1 and len(user.args[1]) > 1
            if not is_view and (user.target not in ONE_BY_ONE or len(user.all_input_nodes) > 1):
                return None
            if not is_view:
                waiting.append(user)
            found.append(user)
    return sorted(found)
