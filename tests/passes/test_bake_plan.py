from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from pmkvq_compiler.passes.bake_plan import BakePlan, cached_attentions, layer_plans
from pmkvq_compiler.passes.base import PreconditionError, run_passes
from pmkvq_compiler.passes.program import Program
from pmkvq_compiler.passes.rewrite_attention import RewriteAttention
from pmkvq_compiler.runtime.plan import CachePlan

from ..programs import full_plan, located


@pytest.fixture
def program() -> Program:
    program = located("gemma2", sliding_window=8)
    run_passes(program, [RewriteAttention()])
    return program


def changed(plan: CachePlan, layer: int, **changes: Any) -> CachePlan:
    layers = list(plan.layers)
    layers[layer] = dataclasses.replace(layers[layer], **changes)
    return dataclasses.replace(plan, layers=tuple(layers))


def test_every_attention_gets_its_layer(program: Program) -> None:
    plan = changed(full_plan(program.sites), 1, key_bits=4)
    run_passes(program, [BakePlan(plan)])
    assert [node.kwargs["plan"] for node in cached_attentions(program)] == list(plan.layers)
    assert layer_plans(program) == list(plan.layers)
    assert program.plan is plan


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"num_key_value_heads": 4}, "the plan of layer 1 has num_key_value_heads 4, but the graph has 2"),
        ({"key_head_dim": 64}, "the plan of layer 1 has key_head_dim 64, but the graph has 16"),
        ({"sliding_window": 8}, "the plan of layer 1 has sliding_window 8, but the graph has None"),
    ],
)
def test_plan_of_another_shape_is_refused(program: Program, changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(PreconditionError, match=reason):
        run_passes(program, [BakePlan(changed(full_plan(program.sites), 1, **changes))])


def test_plan_of_another_length_is_refused(program: Program) -> None:
    plan = full_plan(program.sites[:2])
    with pytest.raises(PreconditionError, match="the plan has 2 layers, but the graph has 3"):
        run_passes(program, [BakePlan(plan)])
