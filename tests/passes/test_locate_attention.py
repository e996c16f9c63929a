from __future__ import annotations

import pytest

from pmkvq_compiler.passes.base import run_passes
from pmkvq_compiler.passes.locate_attention import LocateAttention, markers
from pmkvq_compiler.passes.program import Projection

from ..programs import captured, located


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "mistral", "gemma2", "starcoder2", "granite", "mixtral"])
def test_full_rotate_half_rope_behind_a_linear_layer_folds(model_type: str) -> None:
    assert [site.reason for site in located(model_type).sites] == [None, None, None]


@pytest.mark.parametrize(
    ("model_type", "rows", "offset", "shared"),
    [("qwen3", (16, 16), 0, True), ("gemma3_text", (16, 16), 1, True), ("olmo2", (64, 32), 0, False)],
)
def test_a_norm_before_rope_folds_into_its_own_weight(
    model_type: str, rows: tuple[int, int], offset: float, shared: bool
) -> None:
    for layer, site in enumerate(located(model_type).sites):
        name = f"model.layers.{layer}.self_attn.{{}}_norm.weight"
        assert site.reason is None
        assert site.query == Projection(name.format("q"), None, start=0, rows=rows[0], offset=offset)
        assert site.key == Projection(name.format("k"), None, start=0, rows=rows[1], offset=offset)
        assert site.heads_share_scales == shared


def test_a_norm_whose_weight_is_shared_with_another_layer_does_not_fold() -> None:
    program = captured("qwen3")
    placeholders = {node.name: node for node in program.graph.find_nodes(op="placeholder")}
    own, other = (placeholders[f"model_layers_{layer}_self_attn_k_norm_weight"] for layer in (1, 0))
    own.replace_all_uses_with(other)
    run_passes(program, [LocateAttention()])
    reasons = [site.reason for site in program.sites]
    assert reasons[2] is None
    for reason in reasons[:2]:
        assert reason is not None
        assert "model_layers_0_self_attn_k_norm_weight" in reason
        assert "besides this attention" in reason


def test_site_says_where_q_k_and_v_come_from() -> None:
    site = located("qwen2").sites[1]
    name = "model.layers.1.self_attn.{}_proj"
    assert site.key == Projection(name.format("k") + ".weight", name.format("k") + ".bias", start=0, rows=32)
    assert site.query == Projection(name.format("q") + ".weight", name.format("q") + ".bias", start=0, rows=64)
    assert site.value == Projection(name.format("v") + ".weight", name.format("v") + ".bias", start=0, rows=32)
    assert (site.layer, site.num_attention_heads, site.num_key_value_heads, site.key_head_dim) == (1, 4, 2, 16)
    assert (site.value_head_dim, site.scale, site.sliding_window, site.softcap) == (16, 0.25, None, None)


def test_site_says_window_softcap_and_sinks() -> None:
    gemma, gpt_oss = located("gemma2", sliding_window=8).sites, located("gpt_oss", sliding_window=8).sites
    assert [(site.sliding_window, site.softcap) for site in gemma] == [(8, 50.0), (None, 50.0), (8, 50.0)]
    assert [(site.sliding_window, site.has_sinks) for site in gpt_oss] == [(8, True), (None, True), (8, True)]


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("stablelm", "RoPE turns only 4 of the 16 channels of k_proj (cat_"),
        ("gpt_neox", "RoPE turns only 4 of the 16 channels of query_key_value (cat_"),
        ("cohere", "RoPE pairs neighbouring channels instead of halves of a head (add_"),
        ("gpt_oss", "concatenates halves that RoPE has turned"),
        ("gpt2", "no RoPE between c_attn and the attention"),
        ("opt", "no RoPE between k_proj and the attention"),
    ],
)
def test_a_site_that_does_not_match_says_why(model_type: str, reason: str) -> None:
    for site in located(model_type).sites:
        assert site.reason is not None
        assert reason in site.reason
        assert site.key is None


def test_keys_that_feed_something_else_do_not_fold() -> None:
    program = captured("llama")
    first, second, _ = markers(program.graph)
    second.update_arg(1, first.args[1])
    program.graph.eliminate_dead_code()
    run_passes(program, [LocateAttention()])
    reasons = [site.reason for site in program.sites]
    assert reasons[0] is not None
    assert "attention_1 (pmkvq.attention.default) besides this attention" in reasons[0]
    assert reasons[1] is not None
    assert reasons[2] is None
