"""Bring the graph into a canonical form, without operations that have no effect."""

from __future__ import annotations

import operator
from collections.abc import Callable

import torch
from torch import SymInt
from torch._ops import OpOverload
from torch.fx import Graph, Node

from .base import Pass
from .ops import CASTS, same_form
from .program import Program
from .verify import Stage, is_assertion

aten = torch.ops.aten


class Canonicalize(Pass):
    """Remove ops that have no effect, and write equivalent ops in the same way. Running it twice changes nothing more.

    In a captured graph, a cast to bfloat16 means a cast to the model's own dtype (see `capture`). This pass compares
    casts as they stand in the graph.

    1. Assertions are removed.
    2. An op that returns its operand is replaced by the operand: dropout, casts to the same dtype, full slices,
       expansions to the same shape, products with 1, `detach`, `alias`, `contiguous` in front of a reshape, and a
       concatenation with nothing but empty tensors.
    3. Casts of every kind become `to.dtype`. A device that a cast names is dropped: the operand is already there.
    4. The batch size and the sequence length are read from `input_ids`, and every size is computed once.
    5. An in-place op becomes its functional form, and a copy into a slice becomes a `slice_scatter`, if nothing that
       shares the memory is read afterwards. Two selections of one dimension share none. An in-place op on a slice is
       allowed where its result is copied into that same slice, which is what Python makes of `x[a:b] += y`. The
       verifier refuses in-place ops that remain.
    6. `histc` counts in float32, because some devices cannot count integers.
    7. Dead code is removed, together with weights and constants that nothing reads.
    """

    takes = Stage.REWRITTEN
    leaves = Stage.CANONICAL

    def run(self, program: Program) -> bool:
        graph = program.graph
        modified = _read_sizes_once(graph)
        for node in list(graph.nodes):
            if node.op == "call_function":
                modified |= any(rule(node) for rule in RULES)
        modified |= graph.eliminate_dead_code()
        return _drop_unread(program) or modified


def _drop_assertion(node: Node) -> bool:
    if not is_assertion(node):
        return False
    node.graph.erase_node(node)
    return True


def _drop_identity(node: Node) -> bool:
    operand = node.args[0] if node.args else None
    if not isinstance(operand, Node) or not _returns_operand(node, operand):
        return False
    node.replace_all_uses_with(operand)
    node.graph.erase_node(node)
    return True


def _drop_concatenation(node: Node) -> bool:
    if node.target is not aten.cat.default:
        return False
    (first, *others), *dims = node.args
    dim = dims[0] if dims else 0
    if any(str(other.meta["val"].shape[dim]) != "0" for other in others):
        return False
    node.replace_all_uses_with(first)
    node.graph.erase_node(node)
    return True


def _returns_operand(node: Node, operand: Node) -> bool:
    before, after = operand.meta.get("val"), node.meta.get("val")
    if node.target in CASTS:
        return bool(before.dtype == after.dtype)
    if node.target is aten.slice.Tensor:
        step = node.args[4] if len(node.args) > 4 else 1
        return step == 1 and same_form(operand, node)
    if node.target is aten.expand.default:
        return same_form(operand, node)
    if node.target is aten.mul.Tensor:
        return bool(node.args[1] == 1 and before.dtype == after.dtype)
    if node.target is aten.dropout.default:
        return node.args[2] is False
    if node.target is aten.contiguous.default:
        return all(user.target is aten.reshape.default for user in node.users)
    return node.target in (aten.detach.default, aten.alias.default)


def _unify_cast(node: Node) -> bool:
    if node.target not in CASTS or node.target is aten.to.dtype:
        return False
    node.target, node.args, node.kwargs = aten.to.dtype, (node.args[0], node.meta["val"].dtype), {}
    return True


def _make_functional(node: Node) -> bool:
    """Turn `x.op_(...)` into `op(x, ...)`; later readers of x read the result."""
    if not isinstance(node.target, OpOverload) or not node.target._schema.is_mutable:
        return False
    functional, changed = _functional_form(node.target), node.args[0]
    if functional is None or not (_is_private(changed, node) or _is_copied_back(node)):
        return False
    node.target = functional
    changed.replace_all_uses_with(node, delete_user_cb=lambda user: user > node)
    return True


def _scatter_slice(node: Node) -> bool:
    """Turn `x[a:b].copy_(y)` into `slice_scatter(x, y, a, b)`; later readers of x read the result."""
    if node.target is not aten.copy_.default or node.args[0].target is not aten.slice.Tensor:
        return False
    part, values = node.args[:2]
    whole = part.args[0]
    owned = whole.op == "call_function" and _is_private(whole, node, part)
    if not owned or list(part.users) != [node] or node.users or not same_form(part, values):
        return False
    with node.graph.inserting_before(node):
        scattered = node.graph.call_function(aten.slice_scatter.default, (whole, values, *part.args[1:]))
    scattered.meta = {**node.meta, "val": whole.meta["val"]}
    whole.replace_all_uses_with(scattered, delete_user_cb=lambda user: user > node)
    node.graph.erase_node(node)
    node.graph.erase_node(part)
    return True


def _is_private(changed: Node, place: Node, written: Node | None = None) -> bool:
    """Whether a change of the memory of `changed` at `place` is seen only by those who read `changed` itself.

    `written` is a view of `changed` through which the change is made. Values from outside must have no other reader.
    """
    earlier = [user for user in changed.users if user < place and user is not written]
    if any(_outlives(user, place) for user in earlier):
        return False
    inner = changed
    while _shares_memory(inner):
        base = inner.args[0]
        others = [user for user in base.users if user is not inner and not _are_apart(user, inner)]
        if any(user > place or _outlives(user, place) for user in others):
            return False
        inner = base
    return inner.op == "call_function" or (inner is changed and not earlier)


def _are_apart(one: Node, other: Node) -> bool:
    """Whether two readers of a value select different indices of one dimension."""
    if one.target is not aten.select.int or other.target is not aten.select.int:
        return False
    (_, dim, index), (_, other_dim, other_index) = one.args, other.args
    return bool(dim == other_dim and 0 <= index != other_index >= 0)


def _is_copied_back(node: Node) -> bool:
    """Whether an in-place op changes a slice, and its result is only copied into the same slice."""
    part, users = node.args[0], list(node.users)
    if part.target is not aten.slice.Tensor or list(part.users) != [node] or len(users) != 1:
        return False
    (copy,), whole = users, part.args[0]
    if copy.target is not aten.copy_.default or copy.args[0].args != part.args or copy.args[1] is not node:
        return False
    between = [user for user in whole.users if node < user < copy and user is not copy.args[0]]
    return not between and _is_private(whole, node, part)


def _outlives(view: Node, place: Node) -> bool:
    """Whether a node shares memory with its operand and is still read after `place`."""
    return _shares_memory(view) and any(user > place or _outlives(user, place) for user in view.users)


def _functional_form(target: OpOverload) -> OpOverload | None:
    """The op that is not in place: `aten.add.Tensor` for `aten.add_.Tensor`. None if there is none."""
    packet = getattr(aten, target._schema.name.removeprefix("aten::").removesuffix("_"), None)
    return getattr(packet, target._overloadname, None)


def _shares_memory(node: Node) -> bool:
    """Whether the node's value may be a view of another node's."""
    if node.target in CASTS:  # a cast to another dtype makes a copy
        return bool(node.args[0].meta["val"].dtype == node.meta["val"].dtype)
    source = node.args[0] if node.target is operator.getitem else node
    schema = getattr(source.target, "_schema", None)
    return schema is not None and any(result.alias_info is not None for result in schema.returns)


def _count_in_float(node: Node) -> bool:
    if node.target is not aten.histc.default or node.args[0].meta["val"].is_floating_point():
        return False
    with node.graph.inserting_before(node):
        cast = node.graph.call_function(aten.to.dtype, (node.args[0], torch.float32))
    cast.meta = {**node.meta, "val": node.args[0].meta["val"].to(torch.float32)}
    node.meta["val"] = node.meta["val"].to(torch.float32)
    node.update_arg(0, cast)
    return True


RULES: tuple[Callable[[Node], bool], ...] = (
    _drop_assertion,
    _drop_identity,
    _drop_concatenation,
    _unify_cast,
    _scatter_slice,
    _make_functional,
    _count_in_float,
)
"""The rules that apply to one node. `any` stops at the first rule that changes or erases it."""


def _read_sizes_once(graph: Graph) -> bool:
    """Read the batch size and sequence length from `input_ids`, and compute every size that depends on them once."""
    (input_ids,) = (node for node in graph.find_nodes(op="placeholder") if node.name == "input_ids")
    first: dict[str, Node] = {}
    for dim in (1, 0):
        first[str(input_ids.meta["val"].shape[dim])] = _size_of(input_ids, dim)
    modified = False
    for node in list(graph.nodes):
        if node.op != "call_function" or not isinstance(node.meta.get("val"), SymInt):
            continue
        known = first.setdefault(str(node.meta["val"]), node)
        if known is not node:
            node.replace_all_uses_with(known)
            graph.erase_node(node)
            modified = True
    return modified


def _size_of(input_ids: Node, dim: int) -> Node:
    """The node that reads one size of `input_ids`, placed before all other ops."""
    graph = input_ids.graph
    last = graph.find_nodes(op="placeholder")[-1]
    for node in graph.find_nodes(op="call_function", target=aten.sym_size.int):
        if node.args == (input_ids, dim) and "nn_module_stack" not in node.meta:
            return node
    with graph.inserting_after(last):
        size = graph.call_function(aten.sym_size.int, (input_ids, dim))
    size.meta["val"] = input_ids.meta["val"].shape[dim]
    return size


def _drop_unread(program: Program) -> bool:
    unread = [
        node
        for node in program.graph.find_nodes(op="placeholder")
        if not node.users and (node.name in program.weights or node.name in program.constants)
    ]
    for node in unread:
        program.weights.pop(node.name, None)
        program.constants.pop(node.name, None)
        program.graph.erase_node(node)
    return bool(unread)
