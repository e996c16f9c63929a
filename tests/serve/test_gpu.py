"""The same on a GPU, where the artifact's kernels attend: `pytest -m gpu tests/serve/test_gpu.py`."""

from __future__ import annotations

import functools
import itertools
import statistics
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed here; run make test-serve")

from pmkvq_compiler import runtime
from pmkvq_compiler.runtime.vllm.layout import paged_layers, pool_of

from ..devices import two_gpus
from . import engines
from .engines import Served, all_free, random_prompts
from .test_progressive import FALLING, PROGRESSIVE, ask, assert_fallen_pages_are_final, poison_idle_blocks

pytestmark = pytest.mark.gpu

engine = functools.partial(engines.engine, gpu_memory_utilization=0.1)  # others may use the card, too

SAME = 0.05
"""Nats between the best token and the next, below which either may be chosen: sums are rounded in another order."""

LENGTHS = (7, 40, 130, 513, 777, 64, 200, 300)


def continued(llm: Any, prompts: list[list[int]]) -> list[Any]:
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=150, ignore_eos=True, detokenize=False, logprobs=2)
    done = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False)
    return [one.outputs[0] for one in done]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_cuda_graphs_do_not_change_a_token(served_tiny: Served, dtype: str) -> None:
    """All sequences decode together, so that both have batches of one size; nothing else is compiled."""
    found = []
    for mode in ("NONE", "FULL_DECODE_ONLY"):
        compilation = {"mode": 0, "cudagraph_mode": mode, "cudagraph_capture_sizes": [8]}
        options = {"enforce_eager": False, "max_num_batched_tokens": 4096, "compilation_config": compilation}
        with engine(served_tiny(), dtype=dtype, **options) as llm:
            found.append([list(one.token_ids) for one in continued(llm, random_prompts(LENGTHS))])
            assert all_free(llm)
    assert found[0] == found[1]


def test_graphs_and_compilation_choose_other_tokens_only_where_two_are_as_good(served_tiny: Served) -> None:
    """In chunks, and with batches that are filled up to those that were captured. Only in float32: compiled code rounds
    fewer of a step's numbers to bfloat16, and a number near the border of two codes then gets the other one."""
    found = []
    for eager in (True, False):
        with engine(served_tiny(), enforce_eager=eager) as llm:
            found.append(continued(llm, random_prompts(LENGTHS)))
    assert_alike(*found, SAME)


@two_gpus
@pytest.mark.parametrize(
    "options", [{}, {"recipe": "rotation", "bits": (4,), "budget": "45%"}], ids=["2 bits", "rotated keys"]
)
def test_two_ranks_give_the_same_text(served_tiny: Served, options: dict[str, Any]) -> None:
    """Each has half of the heads, on a GPU of its own. Ranks add up in another order, after which a number may be
    rounded to the next code; texts without such a number have the same probabilities, too."""
    artifact, found = served_tiny(**options), []
    compilation = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": [8]}
    for ranks in (1, 2):
        graphs = {"enforce_eager": False, "compilation_config": compilation}
        with engine(artifact, tensor_parallel_size=ranks, **graphs) as llm:
            found.append(continued(llm, random_prompts(LENGTHS)))
            assert all_free(llm)
    assert_alike(*found, SAME)
    farthest = [farthest_probability(one, other) for one, other in zip(*found, strict=True)]
    print(sum(one.token_ids == other.token_ids for one, other in zip(*found, strict=True)), "equal texts,", farthest)
    assert statistics.median(farthest) < 1e-3


def test_an_idle_pool_gives_the_text_of_the_wide_format(served_tiny: Served) -> None:
    """Pages of 2 bits at tier 4 are those of 8 bits, but that sums are rounded in another order."""
    found = []
    for bits, options in ((8, {}), (2, PROGRESSIVE)):
        artifact = served_tiny(recipe="uniform", budget="70%", bits=(bits,))
        with engine(artifact, dtype="float32", **options) as llm:
            found.append(continued(llm, random_prompts(LENGTHS)))
            assert all_free(llm)
    assert_alike(*found, SAME)


@pytest.mark.parametrize("name", FALLING)
def test_pages_that_have_fallen_are_those_of_the_final_bits(
    served_tiny: Served, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    assert_fallen_pages_are_final(served_tiny(**FALLING[name]), monkeypatch, gpu_memory_utilization=0.1)


def in_a_small_pool(artifact: Path) -> dict[str, Any]:
    """Options of a progressive server whose pages fall, and whose requests are preempted."""
    pool = pool_of(paged_layers(runtime.open_artifact(artifact).manifest.plan, 4), 1400)
    return {"kv_cache_memory_bytes": pool.bytes_needed(3, 1400, 512), "disable_log_stats": False, **PROGRESSIVE}


FALLS: dict[str, Any] = {"recipe": "uniform", "bits": (2,), "budget": "60%", "window": 64}


def test_tiers_change_neither_with_graphs_nor_with_what_nobody_owns(
    served_tiny: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once with graphs, and once with NaNs in all blocks that hold nothing. There are graphs for every number of
    requests: with more, sums are rounded otherwise."""
    artifact, found = served_tiny(**FALLS), []
    for mode, poison in (("NONE", False), ("FULL_DECODE_ONLY", False), ("FULL_DECODE_ONLY", True)):
        compilation = {"mode": 0, "cudagraph_mode": mode, "cudagraph_capture_sizes": [*range(1, 9)]}
        graphs = {"enforce_eager": False, "compilation_config": compilation, **in_a_small_pool(artifact)}
        with monkeypatch.context() as patch, engine(artifact, dtype="float32", **graphs) as llm:
            if poison:
                poison_idle_blocks(llm, patch)
            found.append([list(one.token_ids) for one in continued(llm, random_prompts(LENGTHS))])
            lowered = sum(metric.value for metric in llm.get_metrics() if metric.name == "vllm:pmkvq_lowered")
            assert lowered > 0
            assert all_free(llm)
    assert found[1] == found[2]
    assert found[0] == found[1]


@two_gpus
def test_each_of_two_ranks_lowers_the_pages_of_its_own_heads(served_tiny: Served) -> None:
    """Ranks have pools of other layouts, so pages fall when they are told to."""
    artifact, found = served_tiny(**FALLS), []
    for ranks in (1, 2):
        with engine(artifact, dtype="float32", tensor_parallel_size=ranks, **PROGRESSIVE) as llm:
            found.append(continued_while_pages_fall(llm, random_prompts(LENGTHS)))
            assert all_free(llm)
    assert_alike(*found, SAME)


def continued_while_pages_fall(llm: Any, prompts: list[list[int]]) -> list[Any]:
    """Some pages fall when the last prompt is continued by 20 tokens, and all when it is by 60."""
    core, done, falls = llm.llm_engine, dict[str, Any](), {20: 15, 60: 10_000}
    scheduler = core.engine_core.engine_core.scheduler
    for number, prompt in enumerate(prompts):
        ask(llm, str(number), prompt, 150, logprobs=2)
    while core.has_unfinished_requests():
        done |= {output.request_id: output.outputs[0] for output in core.step() if output.finished}
        running = {request.num_prompt_tokens: request.num_computed_tokens for request in scheduler.requests.values()}
        new = running.get(len(prompts[-1]), 0) - len(prompts[-1])
        if new in falls:
            scheduler._pool._take_back(scheduler.tiers.fall(falls.pop(new)))
    assert not falls
    return [done[str(number)] for number in range(len(prompts))]


def farthest_probability(one: Any, other: Any) -> float:
    """The most nats between the two log-probabilities of a token, up to the first token that differs."""
    pairs = zip(one.token_ids, other.token_ids, one.logprobs, other.logprobs, strict=True)
    shared = itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)
    return max(abs(left[token].logprob - right[token].logprob) for token, _, left, right in shared)


def assert_alike(ones: list[Any], others: list[Any], same: float) -> None:
    """Texts differ only behind a place where two tokens are as good as each other, to `same` nats."""
    shared = 0
    for one, other in zip(ones, others, strict=True):
        pairs = list(zip(one.token_ids, other.token_ids, strict=True))
        first = next((place for place, (left, right) in enumerate(pairs) if left != right), len(pairs))
        shared += first
        if first < len(pairs):
            best, second = sorted((entry.logprob for entry in one.logprobs[first].values()), reverse=True)[:2]
            assert best - second < same, f"token {first} is another one"
    assert shared > len(LENGTHS) * 50
