"""Latent attention over latents computes what the source computes over the expanded keys and values."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig

from pmkvq_compiler.calibrate.attention_hook import ATTENTION, AttentionCall, observed, run
from pmkvq_compiler.calibrate.caches import Caches, latent_caches
from pmkvq_compiler.emit.rehearsal import locate
from pmkvq_compiler.passes.base import run_passes
from pmkvq_compiler.passes.compress_latents import CompressLatents
from pmkvq_compiler.passes.locate_attention import LocateAttention
from pmkvq_compiler.passes.program import AttentionSite, Latent
from pmkvq_compiler.unquantized import cache_bytes_at_16_bits
from tests.families import FAMILIES
from tests.fuzz import chosen
from tests.models import tiny_model
from tests.programs import captured, captured_once, relative_error, run_in_float64

TYPES = chosen(["deepseek_v2", "deepseek_v3", "glm4_moe_lite", "minicpm3"], "minicpm3")


def sites(name: str, **changes: int) -> tuple[AttentionSite, ...]:
    program = captured(FAMILIES[name].model_type, **{**FAMILIES[name].overrides, **changes})
    locate(program, name)
    return tuple(program.sites)


@pytest.mark.parametrize(("name", "dense"), [("minicpm3", {}), ("deepseek_v3", {"first_k_dense_replace": 3})])
def test_results_are_equal(name: str, dense: dict[str, int]) -> None:
    family = FAMILIES[name]
    overrides = {**family.overrides, **dense}  # the interpreter does not count experts in float64
    model, program = (make(family.model_type, **overrides) for make in (tiny_model, captured))
    ids = torch.randint(3, 128, (2, 11), generator=torch.Generator().manual_seed(1))
    before, expanded = run_in_float64(program, model, ids)
    assert run_passes(program, [CompressLatents()])["CompressLatents"].modified
    after, keys = run_in_float64(program, model, ids)
    assert relative_error(after, before) <= 1e-6, "float32 casts of the graph round in another order"
    assert [key.shape[1] for key in keys] == [1, 1, 1]
    assert all(key.shape[1] == 4 for key in expanded)


@pytest.mark.parametrize("name", TYPES)
def test_the_cache_holds_the_latent_and_the_part_that_rope_turns_once_for_all_heads(name: str) -> None:
    for site in sites(name):
        assert (site.num_key_value_heads, site.key_head_dim, site.value_head_dim) == (1, 32 + 8, 32)
        assert site.latent is not None
        assert replace(site.latent, weight="") == Latent("", num_heads=4, key_dim=16, value_dim=16)
        assert site.reason == "the cache holds latents, which are the keys and the values of all heads"


def test_a_latent_that_would_take_more_memory_is_left_expanded() -> None:
    assert all(site.latent is None and site.num_key_value_heads == 4 for site in sites("deepseek_v3", kv_lora_rank=96))


def test_deepseek_v3_takes_37_times_less_than_its_expanded_cache() -> None:
    config = AutoConfig.for_model("deepseek_v3", num_hidden_layers=1, first_k_dense_replace=1, vocab_size=128)
    program = captured_once(config)
    run_passes(program, [LocateAttention()])
    expanded = cache_bytes_at_16_bits(program.sites, 1000, 1)
    run_passes(program, [CompressLatents(), LocateAttention()])
    compressed = cache_bytes_at_16_bits(program.sites, 1000, 1)
    assert (expanded, compressed) == (1000 * 2 * 128 * (192 + 128), 1000 * 2 * (576 + 512))
    assert 37 < expanded / compressed < 38


@pytest.mark.parametrize("name", TYPES)
def test_calibration_sees_what_the_cache_will_hold(name: str) -> None:
    family = FAMILIES[name]
    model = tiny_model(family.model_type, **family.overrides)
    ids = torch.randint(3, 128, (1, 30), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = model(ids).logits
    model.set_attn_implementation(ATTENTION)
    caches = Caches(latents=latent_caches(model, sites(name)))
    shapes = []

    def expanded(call: AttentionCall) -> tuple[AttentionCall, object]:
        seen, restore = caches.seen(call)
        shapes.append((tuple(seen.key.shape), tuple(seen.value.shape)))
        assert relative_error(restore(seen.output()), call.output()) < 1e-5
        return seen, restore

    with torch.no_grad(), observed(lambda call: None, expanded):  # type: ignore[arg-type]
        assert relative_error(run(model, ids, torch.arange(30).unsqueeze(0)), expected) < 1e-5
    assert shapes == [((1, 1, 30, 40), (1, 1, 30, 32))] * 3
