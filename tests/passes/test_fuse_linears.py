from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from pmkvq_compiler.passes.base import run_passes
from pmkvq_compiler.passes.canonicalize import Canonicalize
from pmkvq_compiler.passes.fuse_linears import FuseLinears
from pmkvq_compiler.passes.fuse_norms import FuseNorms
from pmkvq_compiler.passes.ops import FUSED_OPS
from pmkvq_compiler.passes.program import Program
from pmkvq_compiler.passes.rewrite_attention import RewriteAttention
from pmkvq_compiler.passes.verify import is_assertion
from pmkvq_compiler.runtime import fused

from ..fuzz import LONG_ONLY
from ..models import SHAPE, tiny_model
from ..programs import Float64Interpreter, located, relative_error, run_in_float64

LAYERS = SHAPE["num_hidden_layers"]
WIDTH = 32


def fused_ops(program: Program) -> dict[str, int]:
    return dict(Counter(node.target.__name__ for node in program.graph.nodes if node.target in FUSED_OPS))


@pytest.mark.parametrize(
    ("model_type", "overrides", "per_layer"),
    [
        pytest.param("llama", {}, {"linears": 1, "gated_linear": 1, "linear_add": 2}, marks=LONG_ONLY),
        ("llama", {"attention_bias": True, "mlp_bias": True}, {"linears": 1, "gated_linear": 1, "linear_add": 2}),
        pytest.param("qwen2", {}, {"linears": 1, "gated_linear": 1, "linear_add": 2}, marks=LONG_ONLY),
        pytest.param("qwen3", {}, {"linears": 1, "gated_linear": 1, "linear_add": 2}, marks=LONG_ONLY),
        ("gemma2", {}, {"linears": 1, "gated_linear": 1}),
        pytest.param("olmo2", {}, {"linears": 1, "gated_linear": 1}, marks=LONG_ONLY),
        ("phi3", {}, {"linears": 2, "linear_add": 2}),
        pytest.param("cohere", {}, {"linears": 1, "gated_linear": 1, "linear_add": 2}, marks=LONG_ONLY),
    ],
)
def test_linear_layers_of_a_model_are_fused_and_compute_the_same(
    model_type: str, overrides: dict[str, Any], per_layer: dict[str, int]
) -> None:
    input_ids = torch.randint(3, SHAPE["vocab_size"], (2, 9), generator=torch.Generator().manual_seed(2))
    model, program = tiny_model(model_type, **overrides), located(model_type, **overrides)
    run_passes(program, [RewriteAttention(), Canonicalize(), FuseNorms()])
    before, _ = run_in_float64(program, model, input_ids)
    weights = dict(program.weights)
    assert run_passes(program, [FuseLinears()])["FuseLinears"].modified
    after, _ = run_in_float64(program, model, input_ids)
    assert relative_error(after, before) <= 1e-14
    assert fused_ops(program) == {name: LAYERS * count for name, count in per_layer.items()}
    assert program.weights == weights, "every tensor keeps its name"
    left = program.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)
    (head,) = (node for node in left if node.meta["val"].shape[-1] == SHAPE["vocab_size"])
    assert head is left[-1]


def test_norms_that_one_op_reads_become_part_of_it() -> None:
    program = located("llama")
    run_passes(program, [RewriteAttention(), Canonicalize(), FuseNorms(), FuseLinears()])
    norms = program.graph.find_nodes(op="call_function", target=torch.ops.aten.rms_norm.default)
    assert len(norms) == 1, "the last norm, which the head reads"


def test_experts_and_routers_compute_the_same() -> None:
    """Their norm is read by more than one op, and weights of experts are no linear layers."""
    program = located("mixtral")
    run_passes(program, [RewriteAttention(), Canonicalize(), FuseNorms(), FuseLinears()])
    assert fused_ops(program) == {"linears": LAYERS, "linear_add": LAYERS}


Function = Callable[..., Any]


class Layers(nn.Module):
    """One element of a list of layers, which computes `function(layer, x [2, 5, 32], y [2, 5, 48])`."""

    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function
        self.wide, self.other, self.third, self.fourth = (nn.Linear(WIDTH, 48) for _ in range(4))
        self.bare, self.plain = (nn.Linear(WIDTH, 48, bias=False) for _ in range(2))
        self.norm = nn.Parameter(torch.rand(WIDTH) + 0.5)

    def forward(self, x: Tensor, y: Tensor) -> Any:
        return self.function(self, x, y)


class Model(nn.Module):
    def __init__(self, function: Function) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layers(function)])

    def forward(self, x: Tensor, y: Tensor) -> Any:
        return self.layers[0](x, y)


def program_of(function: Function) -> tuple[Program, list[Tensor]]:
    """The program of a layer, and its inputs in float64."""
    torch.manual_seed(4)
    model = Model(function).double()
    inputs = [torch.randn(2, 5, width, dtype=torch.float64) for width in (WIDTH, 48)]
    exported = torch.export.export(model, tuple(inputs), strict=False)
    graph = exported.graph
    for node in list(graph.nodes):
        if node.op == "call_function" and is_assertion(node):
            graph.erase_node(node)
    stored = dict(exported.graph_signature.inputs_to_parameters)
    placeholders = graph.find_nodes(op="placeholder")
    arguments = [exported.state_dict[stored[node.name]] for node in placeholders if node.name in stored]
    names = {node.name: stored.get(node.name, node.name) for node in placeholders}
    for node in placeholders:
        if node.name not in stored:  # inputs, which a program calls by other names
            node.name = {"x": "input_ids", "y": "position_ids"}[node.name]
            names.pop(node.name, None)
    weights = {name: tensor for name, tensor in names.items() if name in stored}
    return Program(GraphModule(nn.Module(), graph), weights, {}), [*arguments, *inputs]


def normed(layer: Layers, x: Tensor) -> Tensor:
    return F.rms_norm(x, [WIDTH], layer.norm, 1e-5)


def four_layers(layer: Layers, x: Tensor, y: Tensor) -> Any:
    return layer.wide(x), layer.other(x), layer.third(x), layer.fourth(x)


def with_and_without_biases(layer: Layers, x: Tensor, y: Tensor) -> Any:
    return layer.wide(x), layer.bare(x), layer.other(x), layer.plain(x)


def viewed(layer: Layers, x: Tensor, y: Tensor) -> Any:
    return layer.wide(x).view(2, 5, 4, 12), layer.other(x).view(10, 48)


def a_norm_and_one_layer(layer: Layers, x: Tensor, y: Tensor) -> Any:
    return layer.wide(normed(layer, x))


def a_norm_read_besides(layer: Layers, x: Tensor, y: Tensor) -> Any:
    n = normed(layer, x)
    return layer.wide(n), layer.other(n), n


def gates(layer: Layers, x: Tensor, y: Tensor) -> Any:
    return layer.wide(x) * F.silu(layer.other(x))


def tanh_gates(layer: Layers, x: Tensor, y: Tensor) -> Any:
    n = normed(layer, x)
    return F.gelu(layer.bare(n), approximate="tanh") * layer.plain(n)


def two_gates_and_a_layer(layer: Layers, x: Tensor, y: Tensor) -> Any:
    n = normed(layer, x)
    return F.silu(layer.wide(n)) * layer.other(n), F.silu(layer.third(n)) * layer.fourth(n), layer.bare(n)


def residual_second(layer: Layers, x: Tensor, y: Tensor) -> Any:
    return layer.wide(x) + y


FUSED: list[tuple[Function, dict[str, int], int]] = [
    (four_layers, {"linears": 1}, 1),
    (with_and_without_biases, {"linears": 2}, 0),
    (viewed, {"linears": 1}, 0),
    (a_norm_and_one_layer, {"linears": 1}, 0),
    (a_norm_read_besides, {"linears": 1}, 0),
    (gates, {"gated_linear": 1}, 0),
    (tanh_gates, {"gated_linear": 1}, 0),
    (two_gates_and_a_layer, {"gated_linear": 2}, 1),
    (residual_second, {"linear_add": 1}, 0),
]


@pytest.mark.parametrize(("function", "ops", "left"), FUSED)
def test_fused_op_computes_the_same(function: Function, ops: dict[str, int], left: int) -> None:
    program, inputs = program_of(function)
    before = Float64Interpreter(program).run(*inputs)
    run_passes(program, [FuseLinears()])
    after = Float64Interpreter(program).run(*inputs)
    assert all(relative_error(one, other) <= 1e-15 for one, other in zip(after, before, strict=True))
    assert fused_ops(program) == ops
    assert len(program.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)) == left
    norms = program.graph.find_nodes(op="call_function", target=torch.ops.aten.rms_norm.default)
    assert len(norms) == (function in (a_norm_read_besides, two_gates_and_a_layer))


def test_results_may_be_parts_of_one_tensor() -> None:
    program, _ = program_of(viewed)
    run_passes(program, [FuseLinears()])
    assert not program.graph.find_nodes(op="call_function", target=torch.ops.aten.view.default)
    (together,) = (node for node in program.graph.nodes if node.target is fused.linears)
    assert [tuple(one.shape) for one in together.meta["val"]] == [(2, 5, 48)] * 2


def one_layer(layer: Layers, x: Tensor, y: Tensor) -> Any:
    return layer.wide(x).sin()


def computed_weight(layer: Layers, x: Tensor, y: Tensor) -> Any:
    return F.linear(x, layer.bare.weight * 2), F.linear(x, layer.plain.weight.sin())


def sum_read_besides(layer: Layers, x: Tensor, y: Tensor) -> Any:
    out = layer.wide(x)
    return out + y, out


def broadcast_residual(layer: Layers, x: Tensor, y: Tensor) -> Any:
    return layer.wide(x) + y[:, :1]


def weighted_sum(layer: Layers, x: Tensor, y: Tensor) -> Any:
    return torch.add(y, layer.wide(x), alpha=0.5)


def doubled(layer: Layers, x: Tensor, y: Tensor) -> Any:
    out = layer.wide(x)
    return out + out


def other_activation(layer: Layers, x: Tensor, y: Tensor) -> Any:
    return F.gelu(layer.wide(x)) * y


@pytest.mark.parametrize(
    "function",
    [one_layer, computed_weight, sum_read_besides, broadcast_residual, weighted_sum, doubled, other_activation],
)
def test_look_alike_is_left_alone(function: Function) -> None:
    program, _ = program_of(function)
    before = str(program.graph)
    assert not run_passes(program, [FuseLinears()])["FuseLinears"].modified
    assert str(program.graph) == before


def activation_read_besides(layer: Layers, x: Tensor, y: Tensor) -> Any:
    gate = F.silu(layer.wide(x))
    return gate * layer.other(x), gate


def exact_gelu(layer: Layers, x: Tensor, y: Tensor) -> Any:
    return F.gelu(layer.wide(x)) * layer.other(x)


def gate_of_another_input(layer: Layers, x: Tensor, y: Tensor) -> Any:
    return F.silu(layer.wide(x)) * layer.other(x.sin())


def mixed_biases(layer: Layers, x: Tensor, y: Tensor) -> Any:
    return F.silu(layer.wide(x)) * layer.bare(x)


@pytest.mark.parametrize(
    "function", [activation_read_besides, exact_gelu, gate_of_another_input, mixed_biases, two_gates_and_a_layer]
)
def test_what_is_no_gate_is_none(function: Function) -> None:
    program, inputs = program_of(function)
    before = Float64Interpreter(program).run(*inputs)
    run_passes(program, [FuseLinears()])
    after = Float64Interpreter(program).run(*inputs)
    assert all(torch.equal(one, other) for one, other in zip(after, before, strict=True))
    gates_found = [node for node in program.graph.nodes if is_gate(node)]
    assert len(gates_found) == (2 if function is two_gates_and_a_layer else 0)


def is_gate(node: Node) -> bool:
    return node.target is fused.gated_linear
