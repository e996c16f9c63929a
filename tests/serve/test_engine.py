"""What vLLM generates from packed pages: the same text, whatever else is served and however the pool is used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pmkvq_compiler import runtime
from pmkvq_compiler.runtime.vllm.layout import paged_layers, pool_of

from .engines import (
    ENGINE,
    REASONER,
    Served,
    all_free,
    block_pool,
    chains,
    engine,
    greedy,
    random_prompts,
)

MODELS: dict[str, dict[str, Any]] = {
    "narrow, K by token or channel": {},
    "K by channel in blocks of 32, no sink": {"recipe": "kivi", "bits": (2,), "budget": "45%"},
    "rotated keys": {"recipe": "rotation", "bits": (4,), "budget": "45%"},
    "sliding layers, soft cap": {
        "model_type": "gemma2",
        "overrides": {"sliding_window": 200, "num_hidden_layers": 4, "query_pre_attn_scalar": 32},
        "budget": "40%",
    },
    "attention sinks, sliding layers": {
        "model_type": "gpt_oss",
        "overrides": {"sliding_window": 100, "num_hidden_layers": 4, "num_local_experts": 4},
        "budget": "50%",
        "block": 32,
        "window": 32,
    },
}


def alone(artifact: Path, prompts: list[list[int]], new: int = 24) -> list[list[int]]:
    """What each prompt gives when it is the only one, fed at once."""
    with engine(artifact, max_num_batched_tokens=2048) as llm:
        found = greedy(llm, prompts, new, together=False)
        assert all_free(llm)
    return found


@pytest.mark.parametrize("name", MODELS)
def test_chunks_and_company_do_not_change_the_text(served_tiny: Served, name: str) -> None:
    artifact, prompts = served_tiny(**MODELS[name]), random_prompts((7, 40, 130, 513, 777, 64))
    expected = alone(artifact, prompts)
    for tokens_a_step in (64, 100, 512) if name == "narrow, K by token or channel" else (100,):
        with engine(artifact, max_num_batched_tokens=tokens_a_step) as llm:
            assert greedy(llm, prompts) == expected, tokens_a_step
            assert all_free(llm)


def test_prefix_hits_do_not_change_the_text(served_tiny: Served) -> None:
    artifact = served_tiny()
    first = random_prompts((300, 513, 777, 64))
    longer = [[*prompt, *extra] for prompt, extra in zip(first, random_prompts((40, 7, 130, 200)), strict=True)]
    branched = [prompt[:200] + extra for prompt, extra in zip(first, random_prompts((90, 91, 92, 93)), strict=True)]
    expected = [alone(artifact, prompts) for prompts in (first, longer, branched)]
    with engine(artifact, enable_prefix_caching=True) as llm:
        for prompts, texts in zip((first, longer, branched, first), (*expected, expected[0]), strict=True):
            assert greedy(llm, prompts) == texts
        assert all_free(llm)
        assert hits(llm, branched) >= 3 * 128, "a prefix that ends inside of a prompt is found, too"


def hits(llm: Any, prompts: list[list[int]]) -> int:
    """Tokens of prompts that are in the prefix cache."""
    from vllm import SamplingParams

    asked = [{"prompt_token_ids": prompt} for prompt in prompts]
    sampling = SamplingParams(max_tokens=1, detokenize=False)
    return sum(one.num_cached_tokens or 0 for one in llm.generate(asked, sampling, use_tqdm=False))


def test_same_prompts_in_one_step_share_pages_that_are_filled_in_it(served_tiny: Served) -> None:
    artifact, prompt = served_tiny(), random_prompts((400,))[0]
    expected = alone(artifact, [prompt])[0]
    with engine(artifact, enable_prefix_caching=True, max_num_batched_tokens=2048) as llm:
        assert greedy(llm, [prompt] * 4) == [expected] * 4
        assert all_free(llm)


def test_preemption_does_not_change_the_text(served_tiny: Served) -> None:
    """A pool that takes two short prompts, one while it is read, but not their answers."""
    artifact, prompts = served_tiny(window=64), random_prompts((150, 170))
    expected = alone(artifact, prompts, new=1000)
    pool = pool_of(paged_layers(runtime.open_artifact(artifact).manifest.plan, 4), 1400)
    rows = sum(group.blocks(1200, 0) for group in pool.groups if group.kind == "rows")
    blocks = max(1 + 2 * 3 + 3 * rows, 1 + pool.blocks_per_sequence(1200, 512) + rows)
    assert blocks < 1 + 2 * (1150 // 64 + rows), "not both answers"
    options = {"max_model_len": 1200, "kv_cache_memory_bytes": blocks * pool.block_bytes, "disable_log_stats": False}
    with engine(artifact, **options, enable_prefix_caching=True) as llm:
        assert greedy(llm, prompts, new=1000) == expected
        assert preemptions(llm) > 0
        assert all_free(llm)


def preemptions(llm: Any) -> int:
    return int(sum(metric.value for metric in llm.get_metrics() if metric.name == "vllm:num_preemptions"))


def test_requests_that_are_aborted_leave_no_block_behind(served_tiny: Served) -> None:
    from vllm import SamplingParams

    with engine(served_tiny(), enable_prefix_caching=True) as llm:
        core = llm.llm_engine
        sampling = SamplingParams(temperature=0, max_tokens=50, ignore_eos=True, detokenize=False)
        for number, prompt in enumerate(random_prompts()):
            core.add_request(str(number), {"prompt_token_ids": prompt}, sampling)
        for step in range(6):
            core.step()
            core.abort_request([str(step)])
        core.abort_request([str(number) for number in range(8)])
        while core.has_unfinished_requests():
            core.step()
        core.step()
        assert all_free(llm)


def test_reported_capacity_is_what_the_plan_promised(served_tiny: Served) -> None:
    for name in ("narrow, K by token or channel", "sliding layers, soft cap"):
        artifact = served_tiny(**MODELS[name])
        plan = runtime.open_artifact(artifact).manifest.plan
        pool = pool_of(paged_layers(plan, 4), plan.max_len)
        promised = pool.tokens(ENGINE["kv_cache_memory_bytes"], ENGINE["max_model_len"], 512)
        with engine(artifact) as llm:
            printed = llm.llm_engine.vllm_config.cache_config.kv_cache_size_tokens
            assert printed == pytest.approx(promised, rel=0.02)
            assert block_pool(llm).num_gpu_blocks == ENGINE["kv_cache_memory_bytes"] // pool.block_bytes


def test_another_model_is_served_as_without_the_plugin(served_tiny: Served) -> None:
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    with engine(served_tiny().parent / "source") as llm:
        groups = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_config.kv_cache_groups
        assert [type(group.kv_cache_spec) for group in groups] == [FullAttentionSpec]
        greedy(llm, random_prompts((7, 40)))


def test_a_plan_that_quantizes_nothing_is_served_as_another_model(served_tiny: Served) -> None:
    artifact, prompts = served_tiny(recipe="none", budget=None), random_prompts((7, 130))
    with engine(artifact) as llm:
        found = greedy(llm, prompts)
    with engine(artifact.parent / "source") as llm:
        assert found == greedy(llm, prompts)


# ---- the project's own reasoner, whose text means something ----


def text_of(length: int, seed: int) -> list[int]:
    """A problem's prompt and as much of its chain as makes so many tokens; the rest of the chain has 24 or more."""
    prompt, chain, _, _ = chains(1, max(200, length + length // 2), seed)[0]
    return (prompt + chain)[:length]


def test_text_at_8_bits_is_that_of_plain_vllm(reasoner: Served) -> None:
    """Eight prompts of 7 to 1,200 tokens, 24 tokens each."""
    artifact = reasoner(recipe="uniform", bits=(8,), budget="70%")
    prompts = [text_of(length, seed=length) for length in (7, 40, 130, 300, 513, 777, 1200, 64)]
    with engine(REASONER / "model") as llm:
        expected = greedy(llm, prompts)
    with engine(artifact) as llm:
        assert greedy(llm, prompts) == expected


def test_distributions_at_the_final_bits_are_the_own_runtimes(reasoner: Served) -> None:
    """Prompt fed in chunks of 100 here, token by token there; mean divergence in nats."""
    from vllm import SamplingParams

    artifact, vocabulary = reasoner(budget="2.8bits"), 242
    prompt, chain, _, _ = chains(1, 900)[0]
    ids = prompt + chain
    model = runtime.load(artifact, dtype="float32")
    cache = model.new_cache(max_len=len(ids))
    for layer in cache.layers:
        layer.stage = max(0, len(layer.plan.stages) - 1)
    expected = torch.cat([model(torch.tensor([[token]]), cache) for token in ids], dim=1)[0].log_softmax(-1)
    assert all(any(layer.flushed) for layer in cache.layers if layer.plan.quantized), "codes were read"
    with engine(artifact, max_num_batched_tokens=100, max_logprobs=vocabulary) as llm:
        sampling = SamplingParams(max_tokens=1, prompt_logprobs=vocabulary, detokenize=False)
        done = llm.generate([{"prompt_token_ids": ids}], sampling, use_tqdm=False)[0].prompt_logprobs
    found = torch.tensor([[place[token].logprob for token in range(vocabulary)] for place in done[1:]])
    divergence = (expected[:-1].exp() * (expected[:-1] - found)).sum(-1)
    assert divergence.mean() <= 1e-3
    assert len(divergence) > 800
