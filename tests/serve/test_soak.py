"""Requests come, end and are aborted at random in a pool that is too small for them: nothing is lost, nothing grows.

Some seconds of it; PMKVQ_SOAK=20 makes it that many minutes.
"""

from __future__ import annotations

import ctypes
import gc
import os
import random
import resource
import time
from collections.abc import Iterator
from typing import Any

import pytest

from pmkvq_compiler import runtime
from pmkvq_compiler.runtime.vllm.layout import paged_layers, pool_of

from .engines import ENGINE, SHAPE, Served, all_free, engine, greedy
from .test_engine import preemptions

SECONDS = 60 * float(os.environ.get("PMKVQ_SOAK", 0)) or 30
KNOWN = 6
"""Prompts whose text is known, from when each was the only one."""
NEW = 40
AT_ONCE = 12
MOST_GROWN = 8 << 20
"""Bytes, however long it takes; plain vLLM moves by a MiB, too."""
SHAPES = 160
"""Numbers of tokens that a step may have, for each of which oneDNN compiles products of its own. vLLM keeps those of
the last 128; once it has them, nothing is left that may grow."""


def resident() -> int:
    """Bytes of this process's memory that are in use: what the allocator holds for later is given back first."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    with open("/proc/self/statm", encoding="ascii") as statm:
        return int(statm.read().split()[1]) * resource.getpagesize()


def random_requests(rng: random.Random, prompts: list[list[int]]) -> Iterator[tuple[int | None, list[int], int]]:
    """Which of the known prompts it is, if one; the prompt; and how many tokens are asked for."""
    while True:
        if rng.random() < 0.3:
            known = rng.randrange(KNOWN)
            yield known, prompts[known], NEW
        else:
            prompt = rng.choice(prompts)[: rng.randrange(1, 300)]  # which another one may begin with, too
            more = [rng.randrange(3, SHAPE["vocab_size"]) for _ in range(rng.randrange(1, 200))]
            yield None, [*prompt, *more], rng.randrange(1, 800)


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="reads Linux's own count of memory")
def test_a_small_pool_serves_random_requests_without_losing_a_block(served_tiny: Served) -> None:
    from vllm import SamplingParams

    artifact, rng = served_tiny(window=64), random.Random(int(SECONDS))
    prompts = [[rng.randrange(3, SHAPE["vocab_size"]) for _ in range(rng.randrange(1, 700))] for _ in range(KNOWN)]
    with engine(artifact) as llm:
        expected = greedy(llm, prompts, NEW, together=False)
    pool = pool_of(paged_layers(runtime.open_artifact(artifact).manifest.plan, 4), ENGINE["max_model_len"])
    rows = sum(group.blocks(ENGINE["max_model_len"], 0) for group in pool.groups if group.kind == "rows")
    blocks = pool.blocks_per_sequence(ENGINE["max_model_len"], ENGINE["max_num_batched_tokens"]) + 2 * rows + 4
    options = {"kv_cache_memory_bytes": blocks * pool.block_bytes, "max_num_seqs": AT_ONCE, "disable_log_stats": False}
    with engine(artifact, enable_prefix_caching=True, **options) as llm:
        core, running, known, finished = llm.llm_engine, set[str](), dict[str, int](), 0
        greedy(
            llm, [[rng.randrange(3, SHAPE["vocab_size"])] * length for length in range(1, SHAPES)], 2, together=False
        )
        before = resident()
        requests, ends = random_requests(rng, prompts), time.monotonic() + SECONDS
        while time.monotonic() < ends or running:
            while len(running) < AT_ONCE and time.monotonic() < ends:
                which, prompt, new = next(requests)
                name = f"{finished}-{len(running)}-{rng.random()}"
                sampling = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)
                core.add_request(name, {"prompt_token_ids": prompt}, sampling)
                running.add(name)
                if which is not None:
                    known[name] = which
            if rng.random() < 0.02:
                gone = rng.choice(sorted(running))
                core.abort_request([gone])
                running.discard(gone)
                known.pop(gone, None)
            for output in core.step():
                if output.finished and output.request_id in running:
                    finished += 1
                    running.discard(output.request_id)
                    check(output, known.pop(output.request_id, None), expected)
        core.step()
        assert all_free(llm)
        assert finished > SECONDS / 10
        assert preemptions(llm) > 0 or SECONDS < 60
        grown = resident() - before
        print(f"{finished} requests, {preemptions(llm)} preemptions, {grown:+,} bytes")
        assert grown < MOST_GROWN


def check(output: Any, which: int | None, expected: list[list[int]]) -> None:
    if which is not None:
        assert list(output.outputs[0].token_ids) == expected[which]
