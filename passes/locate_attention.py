"""Find where each layer's q, k and v come from, and whether key scales can be folded there."""

from __future__ import annotations

import itertools
import operator
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress

import torch
from torch.fx import Graph, Node

from .base import Pass
from .ops import CASTS, MARKER
from .outline_layers import layer_module
from .program import WRAPPER, AttentionSite, Program, Projection
from .verify import Stage, is_assertion

aten = torch.ops.aten

COPIES = frozenset({*CASTS, aten.contiguous.default, aten.clone.default})
RESHAPES = frozenset({aten.transpose.int, aten.view.default, aten.reshape.default})
NORMS = frozenset({aten.rsqrt.default, aten.layer_norm.default, aten.rms_norm.default, aten.linalg_vector_norm.default})
DIVISIONS = frozenset({aten.slice.Tensor, operator.getitem})
LINEARS = frozenset({aten.linear.default, aten.addmm.default})


class LocateAttention(Pass):
    """Fill `program.sites` with one `AttentionSite` for each marker. This pass only analyses the graph.

    1. Shapes, scale, window, soft cap, sinks and the path of the layer's module are read from the marker.
    2. From k, and then from q, the pass walks back through a full rotate-half RoPE, `x * cos + cat(-x2, x1) * sin`
       (x1 and x2 are the halves of x's channels), and through the split into heads, to a linear layer with or without
       bias.
    3. If the operand of RoPE is a product with one weight for each channel, as that of a norm is, the walk ends there:
       scales can be folded into these weights. They may be stored minus 1.
    4. The walk passes through casts and copies. Any other op ends it, and the site keeps the reason.
    5. The matched nodes may feed this attention alone; otherwise scaling them would change something else, too.
    6. The pass walks back from v in the same way but without RoPE, and forward from the attention to the linear layer
       that takes the outputs of all heads. Between these two linear layers, the channels of a head can be transformed.
    7. A marker with the k and v of an earlier one reads that layer's cache. Nothing is folded into such caches, because
       a change of k or v would change what several layers compute.
    """

    takes = Stage.CAPTURED
    leaves = Stage.CAPTURED

    def run(self, program: Program) -> bool:
        before = program.sites
        owners = cache_owners(markers(program.graph))
        shared = {owner for marker, owner in owners.items() if marker is not owner}
        program.sites = [_locate(marker, owner, owner in shared, program) for marker, owner in owners.items()]
        return program.sites != before

    def ensures(self, program: Program) -> None:
        if len(program.sites) != len(markers(program.graph)):
            raise ValueError(f"there are {len(program.sites)} sites for {len(markers(program.graph))} markers")


def markers(graph: Graph) -> list[Node]:
    found: list[Node] = graph.find_nodes(op="call_function", target=MARKER)
    return found


def cache_owners(markers: Sequence[Node]) -> dict[Node, Node]:
    """For each marker, the first one that attends to the same keys and values: itself, unless layers share them."""
    first: dict[tuple[Node, Node], Node] = {}
    for marker in markers:
        first.setdefault(_keys_and_values(marker), marker)
    return {marker: first[_keys_and_values(marker)] for marker in markers}


def _keys_and_values(marker: Node) -> tuple[Node, Node]:
    return _look_through(marker.args[1], set()), _look_through(marker.args[2], set())


class _NoMatchError(Exception):
    """The graph does not have the form that the walk looks for; the message is the reason."""


def _locate(marker: Node, owner: Node, shared: bool, program: Program) -> AttentionSite:
    q, k, v, sinks, scale, layer, sliding_window, softcap = marker.args
    query = key = value = output = reason = None
    try:
        if shared:
            raise _NoMatchError("several layers attend to the same keys and values")
        if "latent" in marker.meta:
            raise _NoMatchError("the cache holds latents, which are the keys and the values of all heads")
        key = _walk(k, marker, program, rotary=True)
        query = _walk(q, marker, program, rotary=True)
    except _NoMatchError as error:
        reason = str(error)
    with suppress(_NoMatchError):
        value = None if shared else _walk(v, marker, program, rotary=False)
        output = _walk_forward(marker, program)
    return AttentionSite(
        layer=layer,
        node=marker.name,
        num_attention_heads=q.meta["val"].shape[1],
        num_key_value_heads=k.meta["val"].shape[1],
        key_head_dim=k.meta["val"].shape[3],
        value_head_dim=v.meta["val"].shape[3],
        scale=scale,
        sliding_window=sliding_window or None,
        softcap=softcap or None,
        has_sinks=sinks is not None,
        query=query,
        key=key,
        value=value,
        reason=reason,
        output=output,
        module=(layer_module(marker) or "").removeprefix(WRAPPER) or None,
        reads=None if owner is marker else owner.args[5],
        chunked=marker.kwargs.get("chunked", False),
        latent=marker.meta.get("latent"),
    )


def _walk(operand: Node, marker: Node, program: Program, rotary: bool) -> Projection:
    """The rows of the linear layer or norm that computes an operand of `marker`. Raises `_NoMatchError`."""
    seen: set[Node] = set()
    node, heads_third = operand, False
    if rotary:
        rotated, heads_third = _match_transposed(operand, seen)
        node = _match_rotary(rotated, seen)
    norm = _match_norm(node, operand, seen) if rotary else None
    if norm is not None:
        weight, bias, offset = norm
    else:
        linear, offset = _match_heads(node, seen, heads_third), 0.0
        weight, bias = linear.args[1], linear.args[2] if len(linear.args) > 2 else None
    parameters = [parameter for parameter in (weight, bias) if parameter is not None]
    for parameter in parameters:
        if parameter.name not in program.weights:
            raise _NoMatchError(f"{parameter.name} is not a tensor of the checkpoint")
    for node in (*seen, *parameters):
        for user in node.users:
            if user is not marker and user not in seen and not is_assertion(user):
                raise _NoMatchError(
                    f"{node.name} ({node.target}) feeds {user.name} ({user.target}) besides this attention"
                )
    return Projection(
        weight=program.weights[weight.name],
        bias=program.weights[bias.name] if bias is not None else None,
        start=0,
        rows=weight.meta["val"].shape[0],
        offset=offset,
    )


def _walk_forward(marker: Node, program: Program) -> str:
    """The weight of the linear layer that takes the concatenated heads of `marker`. Raises `_NoMatchError`."""
    node, width = marker, marker.meta["val"].shape[1] * marker.meta["val"].shape[3]
    while node.target not in LINEARS:
        users = [user for user in node.users if not is_assertion(user)]
        if len(users) != 1 or users[0].target not in (*COPIES, *RESHAPES, *LINEARS):
            raise _NoMatchError(f"{node.name} ({node.target}) feeds more than one op, or an op that is not linear")
        node = users[0]
    weight = node.args[1]
    if node.target is not aten.linear.default or weight.meta["val"].shape[1] != width:
        raise _NoMatchError(f"{node.name} does not take the {width} channels of all heads")
    if weight.name not in program.weights or len(weight.users) > 1:
        raise _NoMatchError(
            f"{node.name} takes {weight.name}, which is not in the checkpoint or is shared with another op"
        )
    return program.weights[weight.name]


def _look_through(node: Node, seen: set[Node]) -> Node:
    while node.target in COPIES:
        seen.add(node)
        node = node.args[0]
    seen.add(node)
    return node


def _match_transposed(operand: Node, seen: set[Node]) -> tuple[Node, bool]:
    """The result of RoPE, and whether heads are still its third dimension and not the second: RoPE may come before or
    after they are moved."""
    path: set[Node] = set()
    node = _look_through(operand, path)
    if node.target is aten.transpose.int and node.args[1:] == (1, 2) and node.args[0].target is aten.add.Tensor:
        seen |= path
        return node.args[0], True
    return operand, False


def _match_rotary(operand: Node, seen: set[Node]) -> Node:
    """The node x, if `operand` is `x * cos + cat(-x2, x1) * sin`. Raises `_NoMatchError` otherwise."""
    node = _look_through(operand, seen)
    if node.target is aten.cat.default:
        raise _NoMatchError(_explain_parts(node))
    norm = next((one for one in _behind(node) if one.target in NORMS), None)
    if node.target is not aten.add.Tensor and norm is not None:
        raise _NoMatchError(f"a norm sits between {_source(node)} and the attention ({norm.name})")
    if node.target is not aten.add.Tensor:
        raise _NoMatchError(
            f"there is no RoPE between {_source(node)} and the attention, which takes {node.name} ({node.target})"
        )
    for straight, turned in (node.args[:2], node.args[1::-1]):
        x = _match_turned(straight, turned, seen)
        if x is not None:
            return x
    if any(one.target in (aten.stack.default, aten.flatten.using_ints) for one in _behind(node)):
        raise _NoMatchError(f"RoPE pairs neighbouring channels instead of halves of a head ({node.name})")
    raise _NoMatchError(f"{node.name} ({node.target}) is not the rotate-half form of RoPE")


def _match_turned(straight: Node, turned: Node, seen: set[Node]) -> Node | None:
    """The node x, if `straight` is `x * cos` and `turned` is `cat(-x2, x1) * sin`. Adds the matched nodes to `seen`."""
    matched: set[Node] = set()
    straight, turned = _look_through(straight, matched), _look_through(turned, matched)
    if straight.target is not aten.mul.Tensor or turned.target is not aten.mul.Tensor:
        return None
    for rotated, factor in itertools.product(turned.args, straight.args):
        path: set[Node] = set()
        x = _match_rotate_half(_look_through(rotated, path), path)
        if x is not None and x is _look_through(factor, path):
            seen |= matched | path
            return x
    return None


def _match_rotate_half(node: Node, matched: set[Node]) -> Node | None:
    """The node x, if `node` is `cat(-x2, x1)` along the channels. Adds the matched nodes to `matched`."""
    if node.target is not aten.cat.default or len(node.args[0]) != 2 or not _is_last(node, node.args[1:]):
        return None
    negated, first = node.args[0]
    if negated.target is not aten.neg.default:
        return None
    second = negated.args[0]
    if first.target is not aten.slice.Tensor or second.target is not aten.slice.Tensor:
        return None
    x, width = first.args[0], node.meta["val"].shape[-1]
    halves = first.args[2:] == (0, width // 2) and second.args[2:] == (width // 2, sys.maxsize)
    if not halves or second.args[0] is not x or not all(_is_last(half, half.args[1:2]) for half in (first, second)):
        return None
    matched |= {node, negated, first, second}
    return _look_through(x, matched)


def _is_last(node: Node, dim: tuple[int, ...]) -> bool:
    return dim in ((-1,), (node.meta["val"].dim() - 1,))


def _match_norm(node: Node, operand: Node, seen: set[Node]) -> tuple[Node, Node | None, float] | None:
    """The weight, the bias and the weight's offset of a norm whose result is `node`, which becomes `operand` [B, heads,
    S, head_dim]; None if there is no norm. Its weight has a number for each channel of a head, or of all heads."""
    _, heads, _, head_dim = operand.meta["val"].shape
    path: set[Node] = set()
    end = _look_through(node, path)
    while end.target in RESHAPES and (end.target is not aten.transpose.int or end.args[1:] == (1, 2)):
        end = _look_through(end.args[0], path)
    candidates: list[tuple[Node, Node | None]] = []
    if end.target is aten.mul.Tensor:
        candidates = [(operand, None) for operand in end.args if isinstance(operand, Node)]
    elif end.target in (aten.rms_norm.default, aten.layer_norm.default):
        given = [*end.args[2:4], None, None]
        candidates = [(given[0], given[1] if end.target is aten.layer_norm.default else None)]
    for factor, bias in candidates:
        through: set[Node] = set()
        weight = factor and _look_through(factor, through)
        offset = 0.0
        if weight is not None and weight.target is aten.add.Tensor and weight.args[1] == 1:
            offset, weight = 1.0, _look_through(weight.args[0], through)
        if (
            weight is None
            or weight.op != "placeholder"
            or weight.meta["val"].shape not in ((head_dim,), (heads * head_dim,))
        ):
            continue
        seen |= path | through
        return weight, bias, offset
    return None


def _match_heads(node: Node, seen: set[Node], heads_third: bool = False) -> Node:
    """The linear layer whose output [B, S, heads * head_dim] was split into `node`: [B, heads, S, head_dim], or [B, S,
    heads, head_dim] if `heads_third`.

    Raises `_NoMatchError`.
    """
    end = node = _look_through(node, seen)
    moved = node.target is aten.transpose.int and node.args[1:] == (1, 2)
    if moved:
        node = _look_through(node.args[0], seen)
    is_split = node.target in (aten.view.default, aten.reshape.default) and node.meta["val"].dim() == 4
    if moved != heads_third and is_split:
        node = _look_through(node.args[0], seen)
    if node.target is aten.linear.default and node.meta["val"].dim() == 3:
        return node
    raise _NoMatchError(_explain_between(node, end))


def _behind(node: Node) -> Iterator[Node]:
    """`node` and the nodes that it is computed from, nearest first, back to the nearest linear layers."""
    waiting, known = [node], {node}
    while waiting:
        one = waiting.pop(0)
        yield one
        if one.target in LINEARS:
            continue
        for operand in one.all_input_nodes:
            if operand not in known:
                known.add(operand)
                waiting.append(operand)


def _source(node: Node) -> str:
    """The name of the module whose linear layer computes `node`, such as "k_proj"."""
    linear = next((one for one in _behind(node) if one.target in LINEARS), None)
    if linear is None:
        return str(node.name)
    path, _ = list(linear.meta["nn_module_stack"].values())[-1]
    return str(path).rpartition(".")[2]


def _explain_parts(node: Node) -> str:
    """The reason why a RoPE that ends in a concatenation does not match."""
    first, width = node.args[0][0].meta["val"].shape[-1], node.meta["val"].shape[-1]
    if first < width and any(part.target in DIVISIONS for part in node.args[0][1:]):
        return f"RoPE turns only {first} of the {width} channels of {_source(node)} ({node.name})"
    if first == width:
        return f"{node.name} concatenates the channels that RoPE has turned with a part that has no channels"
    return f"{node.name} concatenates halves that RoPE has turned, which is not the form x * cos + cat(-x2, x1) * sin"


def _explain_between(node: Node, end: Node) -> str:
    """The reason why the walk from `end`, the operand of RoPE, stopped at `node`."""
    norm = next((one for one in _behind(end) if one.target in NORMS), None)
    if norm is not None:
        return f"a norm sits between {_source(end)} and RoPE ({norm.name})"
    if any(one.target in DIVISIONS for one in _behind(end)):
        return f"q, k and v are parts of one fused projection, {_source(end)} ({node.name})"
    return f"{node.name} ({node.target}) sits between {_source(end)} and RoPE"
