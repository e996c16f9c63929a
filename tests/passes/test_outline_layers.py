from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from pmkvq_compiler.passes.bake_plan import BakePlan, layer_plans
from pmkvq_compiler.passes.base import run_passes
from pmkvq_compiler.passes.canonicalize import Canonicalize
from pmkvq_compiler.passes.outline_layers import OutlineLayers
from pmkvq_compiler.passes.program import Program
from pmkvq_compiler.passes.rewrite_attention import RewriteAttention

from ..models import SHAPE, tiny_model
from ..programs import full_plan, located, run_in_float64


def canonical(model_type: str, **overrides: Any) -> Program:
    program = located(model_type, **overrides)
    run_passes(program, [RewriteAttention(), BakePlan(full_plan(program.sites)), Canonicalize()])
    return program


def kinds(program: Program) -> list[str]:
    return [call.target for call in program.graph.find_nodes(op="call_module")]


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "gpt_neox"])
def test_results_are_equal(model_type: str) -> None:
    input_ids = torch.randint(3, SHAPE["vocab_size"], (2, 9), generator=torch.Generator().manual_seed(2))
    model, program = tiny_model(model_type), canonical(model_type)
    before, _ = run_in_float64(program, model, input_ids)
    assert run_passes(program, [OutlineLayers()])["OutlineLayers"].modified
    after, keys = run_in_float64(program, model, input_ids)
    assert torch.equal(before, after)
    assert len(keys) == 3


@pytest.mark.parametrize(
    ("model_type", "overrides"),
    [("llama", {}), ("gemma2", {"sliding_window": 8}), ("gpt_oss", {"sliding_window": 8}), ("mixtral", {})],
)
def test_equal_layers_share_one_function(model_type: str, overrides: dict[str, Any]) -> None:
    program = canonical(model_type, **overrides)
    run_passes(program, [OutlineLayers()])
    assert kinds(program) == ["decoder_layer"] * 3


def test_layers_with_and_without_experts_are_two_kinds() -> None:
    program = canonical("qwen3_moe", mlp_only_layers=[1])
    run_passes(program, [OutlineLayers()])
    assert kinds(program) == ["decoder_layer", "decoder_layer_2", "decoder_layer"]


def test_each_call_has_its_layer_plan_and_tensors() -> None:
    program = canonical("llama")
    run_passes(program, [OutlineLayers()])
    assert program.plan is not None
    assert layer_plans(program) == list(program.plan.layers)
    call = program.graph.find_nodes(op="call_module")[2]
    body = program.graph_module.get_submodule(call.target).graph
    for placeholder, argument in zip(body.find_nodes(op="placeholder"), call.args, strict=True):
        if "tensor" in placeholder.meta:
            assert program.weights[argument.name] == placeholder.meta["tensor"].format(layer=2)
    assert call.args[0] == 2


def test_all_that_is_left_outside_is_what_no_layer_computes() -> None:
    program = canonical("llama")
    run_passes(program, [OutlineLayers()])
    left = Counter(str(node.target) for node in program.graph.nodes if node.op == "call_function")
    assert left["aten.linear.default"] == 1
    assert left["aten.embedding.default"] == 1


def test_layer_that_is_read_inside_stays() -> None:
    program = canonical("llama")
    linear = program.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)[1]
    (output,) = program.graph.find_nodes(op="output")
    with program.graph.inserting_before(output):
        extra = program.graph.call_function(torch.ops.aten.mean.default, (linear,))
        total = program.graph.call_function(torch.ops.aten.add.Tensor, (output.args[0], extra))
    extra.meta["val"], total.meta["val"] = linear.meta["val"].mean(), output.args[0].meta["val"]
    output.args = (total,)
    assert not run_passes(program, [OutlineLayers()])["OutlineLayers"].modified
    assert kinds(program) == []
