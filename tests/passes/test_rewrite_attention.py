from __future__ import annotations

from pmkvq_compiler.passes.bake_plan import cached_attentions
from pmkvq_compiler.passes.base import run_passes
from pmkvq_compiler.passes.locate_attention import markers
from pmkvq_compiler.passes.rewrite_attention import RewriteAttention

from ..programs import located


def test_markers_become_attention_over_the_cache() -> None:
    program = located("gemma2", sliding_window=8)
    operands = [marker.args[:3] for marker in markers(program.graph)]
    run_passes(program, [RewriteAttention()])
    nodes = cached_attentions(program)
    assert markers(program.graph) == []
    assert [node.args[:3] for node in nodes] == operands
    assert [node.args[3].name for node in nodes] == ["cache"] * 3
    assert [node.args[4] for node in nodes] == [0, 1, 2]
    assert [(node.kwargs["scale"], node.kwargs["softcap"], node.kwargs["sinks"]) for node in nodes] == [
        (0.0625, 50.0, None)
    ] * 3
    assert [site.node for site in program.sites] == [node.name for node in nodes]


def test_cache_is_the_third_input() -> None:
    program = located("llama")
    run_passes(program, [RewriteAttention()])
    inputs = [node.name for node in program.graph.find_nodes(op="placeholder")]
    assert inputs[:4] == ["input_ids", "position_ids", "cache", "model_embed_tokens_weight"]


def test_sinks_stay_an_operand() -> None:
    program = located("gpt_oss")
    run_passes(program, [RewriteAttention()])
    assert [node.kwargs["sinks"].name for node in cached_attentions(program)] == [
        f"model_layers_{layer}_self_attn_sinks" for layer in range(3)
    ]
