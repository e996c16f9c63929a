from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from pmkvq_compiler.passes.base import run_passes
from pmkvq_compiler.passes.canonicalize import Canonicalize
from pmkvq_compiler.passes.fuse_rope import FuseRope
from pmkvq_compiler.passes.program import Program
from pmkvq_compiler.passes.rewrite_attention import RewriteAttention
from pmkvq_compiler.passes.verify import is_assertion
from pmkvq_compiler.runtime import fused

from ..fuzz import LONG_ONLY
from ..models import SHAPE, tiny_model
from ..programs import Float64Interpreter, located, relative_error, run_in_float64

LAYERS = SHAPE["num_hidden_layers"]


def ropes(program: Program) -> list[Node]:
    return program.graph.find_nodes(op="call_function", target=fused.rope)


@pytest.mark.parametrize(
    ("model_type", "per_layer"),
    [
        pytest.param("llama", 1, marks=LONG_ONLY),
        pytest.param("qwen2", 1, marks=LONG_ONLY),
        pytest.param("qwen3", 1, marks=LONG_ONLY),
        pytest.param("gemma2", 1, marks=LONG_ONLY),
        ("gemma3_text", 1),
        pytest.param("phi3", 1, marks=LONG_ONLY),
        pytest.param("cohere", 0, marks=LONG_ONLY),
        ("glm", 0),
    ],
)
def test_positions_of_queries_and_keys_become_one_op(model_type: str, per_layer: int) -> None:
    """Cohere and GLM pair neighbours, so they keep what they have."""
    input_ids = torch.randint(3, SHAPE["vocab_size"], (2, 9), generator=torch.Generator().manual_seed(2))
    model, program = tiny_model(model_type), located(model_type)
    run_passes(program, [RewriteAttention(), Canonicalize()])
    before, keys = run_in_float64(program, model, input_ids)
    run_passes(program, [FuseRope()])
    after, turned = run_in_float64(program, model, input_ids)
    assert relative_error(after, before) <= 1e-14
    assert all(torch.equal(one, other) for one, other in zip(keys, turned, strict=True))
    assert len(ropes(program)) == LAYERS * per_layer
    assert all(len(node.args[0]) == 2 for node in ropes(program))


Function = Callable[..., Any]


def program_of(function: Function) -> Program:
    """The program of `function(x, y, cos, sin)`: two [2, 3, 5, 8], two [2, 5, 8]."""

    class Module(nn.Module):
        def forward(self, x: Tensor, y: Tensor, cos: Tensor, sin: Tensor) -> Any:
            return function(x, y, cos.unsqueeze(1), sin.unsqueeze(1))

    graph = torch.export.export(Module(), inputs(), strict=False).graph
    for node in list(graph.nodes):
        if node.op == "call_function" and is_assertion(node):
            graph.erase_node(node)
    return Program(GraphModule(nn.Module(), graph), {name: name for name in ("x", "y", "cos", "sin")}, {})


def inputs() -> tuple[Tensor, ...]:
    torch.manual_seed(3)
    shapes = ((2, 3, 5, 8), (2, 3, 5, 8), (2, 5, 8), (2, 5, 8))
    return tuple(torch.randn(*shape, dtype=torch.float64) for shape in shapes)


def crossed(x: Tensor) -> Tensor:
    return torch.cat([-x[..., 4:], x[..., :4]], dim=-1)


def llama(x: Tensor, y: Tensor, cos: Tensor, sin: Tensor) -> Any:
    return x * cos + crossed(x) * sin, y * cos + crossed(y) * sin


def operands_swapped(x: Tensor, y: Tensor, cos: Tensor, sin: Tensor) -> Any:
    return sin * crossed(x) + cos * x, crossed(y) * sin + y * cos


def one_alone(x: Tensor, y: Tensor, cos: Tensor, sin: Tensor) -> Any:
    return x * cos + crossed(x) * sin, y


def read_before_the_other(x: Tensor, y: Tensor, cos: Tensor, sin: Tensor) -> Any:
    first = x * cos + crossed(x) * sin
    other = first.sin() + y
    return first, other * cos + crossed(other) * sin


def other_tables(x: Tensor, y: Tensor, cos: Tensor, sin: Tensor) -> Any:
    return x * cos + crossed(x) * sin, y * sin + crossed(y) * cos


@pytest.mark.parametrize(
    ("function", "count"),
    [(llama, 1), (operands_swapped, 1), (one_alone, 1), (read_before_the_other, 2), (other_tables, 2)],
)
def test_fused_op_computes_the_same(function: Function, count: int) -> None:
    program = program_of(function)
    before = Float64Interpreter(program).run(*inputs())
    run_passes(program, [FuseRope()])
    after = Float64Interpreter(program).run(*inputs())
    assert all(relative_error(one, other) <= 1e-15 for one, other in zip(after, before, strict=True))
    assert len(ropes(program)) == count
    assert not program.graph.find_nodes(op="call_function", target=torch.ops.aten.cat.default)


def other_sign(x: Tensor, y: Tensor, cos: Tensor, sin: Tensor) -> Any:
    return x * cos + torch.cat([x[..., 4:], -x[..., :4]], -1) * sin


def sign_missing(x: Tensor, y: Tensor, cos: Tensor, sin: Tensor) -> Any:
    return x * cos + torch.cat([x[..., 4:], x[..., :4]], -1) * sin


def halves_in_place(x: Tensor, y: Tensor, cos: Tensor, sin: Tensor) -> Any:
    return x * cos + torch.cat([-x[..., :4], x[..., 4:]], -1) * sin


def unequal_parts(x: Tensor, y: Tensor, cos: Tensor, sin: Tensor) -> Any:
    return x * cos + torch.cat([-x[..., 3:], x[..., :3]], -1) * sin


def neighbours(x: Tensor, y: Tensor, cos: Tensor, sin: Tensor) -> Any:
    turned = torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
    return x * cos + turned * sin


def halves_of_another(x: Tensor, y: Tensor, cos: Tensor, sin: Tensor) -> Any:
    return x * cos + crossed(y) * sin


def over_tokens(x: Tensor, y: Tensor, cos: Tensor, sin: Tensor) -> Any:
    return x * cos + torch.cat([-x[:, :, 4:], x[:, :, :4]], 2) * sin


def subtracted(x: Tensor, y: Tensor, cos: Tensor, sin: Tensor) -> Any:
    return x * cos - crossed(x) * sin


def tables_of_every_head(x: Tensor, y: Tensor, cos: Tensor, sin: Tensor) -> Any:
    return x * y + crossed(x) * sin, cos


def crossed_read_besides(x: Tensor, y: Tensor, cos: Tensor, sin: Tensor) -> Any:
    half = crossed(x)
    return x * cos + half * sin, half


def product_read_besides(x: Tensor, y: Tensor, cos: Tensor, sin: Tensor) -> Any:
    product = x * cos
    return product + crossed(x) * sin, product


@pytest.mark.parametrize(
    "function",
    [
        other_sign,
        sign_missing,
        halves_in_place,
        unequal_parts,
        neighbours,
        halves_of_another,
        over_tokens,
        subtracted,
        tables_of_every_head,
        crossed_read_besides,
        product_read_besides,
    ],
)
def test_look_alike_is_left_alone(function: Function) -> None:
    program = program_of(function)
    before = str(program.graph)
    assert not run_passes(program, [FuseRope()])["FuseRope"].modified
    assert str(program.graph) == before
