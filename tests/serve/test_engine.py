"""What vLLM generates from packed pages: the same text, whatever else is served and however the pool is used."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from pmkvq_compiler import runtime
from pmkvq_compiler.runtime.vllm.layout import paged_layers, pool_of

from .engines import (
    ENGINE,
    REASONER,
    Alone,
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


CHUNKED = random_prompts((7, 40, 130, 513, 777, 64))
FIRST = random_prompts((300, 513, 777, 64))
LONGER = [[*prompt, *extra] for prompt, extra in zip(FIRST, random_prompts((40, 7, 130, 200)), strict=True)]
BRANCHED = [prompt[:200] + extra for prompt, extra in zip(FIRST, random_prompts((90, 91, 92, 93)), strict=True)]
SHARED = random_prompts((400,))[0]
PROMPTS = [*CHUNKED, *FIRST, *LONGER, *BRANCHED, SHARED]


@pytest.mark.parametrize("name", MODELS)
def test_chunks_and_company_do_not_change_the_text(served_tiny: Served, alone: Alone, name: str) -> None:
    artifact = served_tiny(**MODELS[name])
    narrow = name == "narrow, K by token or channel"
    expected = alone(artifact, PROMPTS if narrow else CHUNKED)[: len(CHUNKED)]
    for tokens_a_step in (64, 100, 512) if narrow else (100,):
        with engine(artifact, max_num_batched_tokens=tokens_a_step) as llm:
            assert greedy(llm, CHUNKED) == expected, tokens_a_step
            assert all_free(llm)


class TestPrefixCache:
    """One engine, whose cache is empty when a test begins."""

    @pytest.fixture(scope="class")
    def shared(self, served_tiny: Served) -> Iterator[Any]:
        with engine(served_tiny(), enable_prefix_caching=True, max_num_batched_tokens=512) as llm:
            yield llm

    @pytest.fixture
    def llm(self, shared: Any) -> Any:
        assert shared.reset_prefix_cache()
        return shared

    def test_prefix_hits_do_not_change_the_text(self, llm: Any, served_tiny: Served, alone: Alone) -> None:
        for prompts in (FIRST, LONGER, BRANCHED, FIRST):
            assert greedy(llm, prompts) == alone(served_tiny(), prompts)
        assert all_free(llm)
        assert hits(llm, BRANCHED) >= 3 * 128, "a prefix that ends inside of a prompt is found, too"

    def test_same_prompts_in_one_step_share_pages_that_are_filled_in_it(
        self, llm: Any, served_tiny: Served, alone: Alone
    ) -> None:
        assert greedy(llm, [SHARED] * 4) == alone(served_tiny(), [SHARED]) * 4
        assert all_free(llm)

    def test_requests_that_are_aborted_leave_no_block_behind(self, llm: Any) -> None:
        from vllm import SamplingParams

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


def hits(llm: Any, prompts: list[list[int]]) -> int:
    """Tokens of prompts that are in the prefix cache."""
    from vllm import SamplingParams

    asked = [{"prompt_token_ids": prompt} for prompt in prompts]
    sampling = SamplingParams(max_tokens=1, detokenize=False)
    return sum(one.num_cached_tokens or 0 for one in llm.generate(asked, sampling, use_tqdm=False))


def test_preemption_does_not_change_the_text(served_tiny: Served, alone: Alone) -> None:
    """A pool that takes two short prompts, one while it is read, but not their answers."""
    artifact, prompts = served_tiny(window=64), random_prompts((150, 170))
    expected = alone(artifact, prompts, new=1100)
    pool = pool_of(paged_layers(runtime.open_artifact(artifact).manifest.plan, 4), 1400)
    rows = sum(group.blocks(1300, 0) for group in pool.groups if group.kind == "rows")
    blocks = max(1 + 2 * 3 + 3 * rows, pool.bytes_needed(1, 1300, 512) // pool.block_bytes)
    assert blocks < 1 + 2 * pool.blocks_per_sequence(1250, 0), "not both answers"
    options = {"max_model_len": 1300, "kv_cache_memory_bytes": blocks * pool.block_bytes, "disable_log_stats": False}
    with engine(artifact, **options, enable_prefix_caching=True) as llm:
        assert greedy(llm, prompts, new=1100) == expected
        assert preemptions(llm) > 0
        assert all_free(llm)


def preemptions(llm: Any) -> int:
    return int(sum(metric.value for metric in llm.get_metrics() if metric.name == "vllm:num_preemptions"))


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
    """And a plan that quantizes nothing as another model."""
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    artifact, found = served_tiny(recipe="none", budget=None), []
    for model in (artifact.parent / "source", artifact):
        with engine(model) as llm:
            groups = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_config.kv_cache_groups
            assert [type(group.kv_cache_spec) for group in groups] == [FullAttentionSpec]
            found.append(greedy(llm, random_prompts((7, 130))))
    assert found[0] == found[1]


def test_sequences_that_a_server_was_planned_for_decode_at_once_in_its_budget(served_tiny: Served) -> None:
    """vLLM counts as the planner did: they all fit, and of one more it says that it does not."""
    count, length = 5, 1000
    artifact = served_tiny(budget="60%", max_len=length, batch_size=count, serve=True)
    plan = runtime.open_artifact(artifact).manifest.plan
    pool = pool_of(paged_layers(plan, 4), length)
    needed = pool.bytes_needed(count, length, ENGINE["max_num_batched_tokens"])
    assert plan.arena_bytes < needed <= plan.budget
    options = {"max_model_len": length, "kv_cache_memory_bytes": needed, "disable_log_stats": False}
    with engine(artifact, **options) as llm:
        config = llm.llm_engine.vllm_config.cache_config
        assert config.num_gpu_blocks * pool.block_bytes == needed
        assert count * length <= config.kv_cache_size_tokens < (count + 1) * length
        assert at_once(llm, random_prompts((length - 40,) * count), 40) == count
        assert preemptions(llm) == 0
        assert at_once(llm, random_prompts((length - 40,) * (count + 1)), 40) == count


def at_once(llm: Any, prompts: list[list[int]], new: int) -> int:
    """The most prompts that ran in one step and stayed, until all had `new` tokens."""
    from vllm import SamplingParams

    core, most = llm.llm_engine, 0
    sampling = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)
    for number, prompt in enumerate(prompts):
        core.add_request(str(number), {"prompt_token_ids": prompt}, sampling)
    while core.has_unfinished_requests():
        core.step()
        most = max(most, len(core.engine_core.engine_core.scheduler.running))
    return most


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
