"""Put linear layers together with what is computed before and after them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from pmkvq_compiler.runtime import fused

from .base import Pass
from .ops import call_before, only_reader, replace_together, same_form
from .outline_layers import layer_module
from .program import Program
from .verify import Stage

aten = torch.ops.aten

MOST_LAYERS = 3
"""Linear layers of one op, such as the projections of q, k and v."""


class FuseLinears(Pass):
    """Replace linear layers by ops that a device may run as one kernel (`runtime/fused.py`). Weights keep their names.

    1. `activation(gate(x)) * up(x)`, with two linear layers, and SiLU or GELU approximated by tanh, becomes
       `gated_linear`.
    2. `residual + layer(x)` becomes `linear_add`, where no other linear layer reads x and the residual has the shape of
       the sum.
    3. Other linear layers of one input, all with a bias or all without, become `linears`, up to three at a time. Their
       results may then be parts of one tensor, so each `view` of them becomes `reshape`.
    4. An RMS norm becomes part of the op of rules 1 and 3 that alone reads it, if its operand and weight are in one
       dtype.
    5. Everything else stays as it is: linear layers outside the model's layers, those whose weights are computed, those
       with a result in between that another op reads, and those of which rule 3 finds only one, without a norm.
    """

    takes = Stage.CANONICAL
    leaves = Stage.CANONICAL

    def run(self, program: Program) -> bool:
        layers: dict[Node, list[Node]] = {}
        for node in program.graph.nodes:
            if _is_stored(node, program):
                layers.setdefault(node.args[0], []).append(node)
        found = [_fuse(alike) for alike in layers.values()]
        program.graph.eliminate_dead_code()
        return any(found)


@dataclass(frozen=True)
class Gate:
    """`product` is the activation of the linear layer `gate` times the linear layer `up`."""

    product: Node
    gate: Node
    up: Node
    activation: str


def _is_stored(node: Node, program: Program) -> bool:
    """Whether a node is a linear layer of one of the model's layers, whose weight and bias the checkpoint has."""
    if node.target is not aten.linear.default or layer_module(node) is None:
        return False
    return all(one is None or one.name in program.weights for one in (_weight(node), _bias(node)))


def _fuse(layers: Sequence[Node]) -> bool:
    """Fuse all linear layers that read one value; returns whether any was."""
    x = layers[0].args[0]
    gates = list(_gates(layers))
    gated = {layer for one in gates for layer in (one.gate, one.up)}
    rest = [layer for layer in layers if layer not in gated]
    total = only_reader(rest[0]) if len(layers) == 1 else None
    if total is not None and (residual := _residual(total, rest[0])) is not None:
        _replace(total, fused.linear_add, (residual, x, _weight(rest[0]), _bias(rest[0])))
        return True
    groups = [
        alike[start : start + MOST_LAYERS]
        for alike in ([layer for layer in rest if (_bias(layer) is None) is without] for without in (True, False))
        for start in range(0, len(alike), MOST_LAYERS)
    ]
    norm = x if len(gates) + len(groups) == 1 and _is_norm(x) and x.users.keys() <= {*layers} else None
    operand, extra = (x, ()) if norm is None else (norm.args[0], norm.args[2:])
    for one in gates:
        _replace(one.product, fused.gated_linear, (operand, *_tensors([one.gate, one.up]), one.activation, *extra))
    groups = [group for group in groups if len(group) > 1 or norm is not None]
    for group in groups:
        _replace_all(group, (operand, *_tensors(group), *extra))
    return bool(gates or groups)


def _gates(layers: Sequence[Node]) -> Iterator[Gate]:
    """The gates among linear layers of one input."""
    for gate in layers:
        activated = only_reader(gate)
        activation = None if activated is None else _activation(activated)
        product = None if activation is None or activated is None else only_reader(activated)
        if activation is None or product is None or product.target is not aten.mul.Tensor:
            continue
        up = product.args[1] if product.args[0] is activated else product.args[0]
        alike = up in layers and up is not gate and (_bias(up) is None) is (_bias(gate) is None)
        if alike and only_reader(up) is product and same_form(gate, up):
            yield Gate(product, gate, up, activation)


def _activation(node: Node) -> str | None:
    """The name of an activation in `fused.ACTIVATIONS`; None for any other op."""
    if node.target is aten.silu.default:
        return "silu"
    return "gelu_tanh" if node.target is aten.gelu.default and node.kwargs == {"approximate": "tanh"} else None


def _residual(total: Node, layer: Node) -> Node | None:
    """What `total` adds to the result of a linear layer, if it is of the same shape; else None."""
    if total.target is not aten.add.Tensor or total.kwargs:
        return None
    other = total.args[1] if total.args[0] is layer else total.args[0]
    return other if isinstance(other, Node) and other is not layer and same_form(other, layer) else None


def _is_norm(node: Node) -> bool:
    """Whether a node is an RMS norm whose operand and weight are in one dtype."""
    if node.target is not aten.rms_norm.default or not isinstance(node.args[2], Node):
        return False
    return bool(node.args[0].meta["val"].dtype == node.args[2].meta["val"].dtype)


def _tensors(layers: Sequence[Node]) -> tuple[list[Node], list[Node | None] | None]:
    """The weights of linear layers, and their biases, which all or none of them have."""
    biases = [_bias(layer) for layer in layers]
    return [_weight(layer) for layer in layers], None if biases[0] is None else biases


def _weight(layer: Node) -> Node:
    weight: Node = layer.args[1]
    return weight


def _bias(layer: Node) -> Node | None:
    bias: Node | None = layer.args[2] if len(layer.args) > 2 else None
    return bias


def _replace(result: Node, op: Callable[..., Any], args: tuple[Any, ...]) -> None:
    """Put a call of `op` in the place of the node `result`."""
    result.replace_all_uses_with(call_before(result, op, _given(args), result, result.meta["val"]))


def _replace_all(layers: Sequence[Node], args: tuple[Any, ...]) -> None:
    """Put one call of `linears` in the place of linear layers."""
    for reader in (reader for layer in layers for reader in layer.users):
        if reader.target is aten.view.default:
            reader.target = aten.reshape.default
    replace_together(layers, layers[0], fused.linears, _given(args))


def _given(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Arguments without those at the end that are None: a bias that there is not, for example."""
    while args[-1] is None:
        args = args[:-1]
    return args
