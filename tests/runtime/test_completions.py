"""Which requests a step is said to complete blocks of, beside what each request's tokens say."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest

from pmkvq_compiler.runtime.vllm.completions import Completions

BLOCK = 16


def output(new: dict[str, int], begun: list[str], resumed: set[str]) -> Any:
    """What of vLLM's `SchedulerOutput` says who gets how many tokens."""
    return SimpleNamespace(
        num_scheduled_tokens=new,
        total_num_scheduled_tokens=sum(new.values()),
        scheduled_new_reqs=[SimpleNamespace(req_id=name) for name in begun],
        scheduled_cached_reqs=SimpleNamespace(resumed_req_ids=resumed),
    )


@pytest.mark.parametrize("sinks", [(4,), (0, 4)])
def test_no_step_that_completes_a_block_is_missed(sinks: tuple[int, ...]) -> None:
    """Requests come with tokens that are there already or without, pause, are preempted and come back, and end."""
    rng, completions = random.Random(sum(sinks)), Completions(BLOCK, sinks)
    requests: dict[str, Any] = {}
    waiting: dict[str, int] = {}
    asked = found = 0
    for step in range(4000):
        begun, resumed = list[str](), set[str]()
        if len(requests) < 20 and rng.random() < 0.2:
            name = f"request {step}"
            requests[name] = SimpleNamespace(num_computed_tokens=rng.choice((0, 0, rng.randrange(1, 100))))
            begun.append(name)
        for name in [name for name in requests if rng.random() < 0.01]:
            if name in begun or name in waiting:
                continue
            waiting[name] = requests[name].num_computed_tokens
            requests[name].num_computed_tokens = 0
        for name in [name for name in waiting if rng.random() < 0.1]:
            requests[name].num_computed_tokens = rng.randrange(waiting.pop(name) + 1)
            resumed.add(name)
        ready = [
            name
            for name in requests
            if name not in waiting and (name in begun or name in resumed or rng.random() < 0.9)
        ]
        new = {name: 1 if rng.random() < 0.97 else rng.randrange(1, 40) for name in ready}
        for name, count in new.items():
            requests[name].num_computed_tokens += count
        expected = {name for name, count in new.items() if completes(requests[name].num_computed_tokens, count, sinks)}
        if new:
            told = list(completions.of(output(new, begun, resumed), requests))
            assert all(end == requests[name].num_computed_tokens == start + new[name] for name, start, end in told)
            assert len(told) == len({name for name, *_ in told})
            assert {name for name, *_ in told} >= expected
            asked, found = asked + len(told), found + len(expected)
        for name in [name for name in requests if rng.random() < 0.005]:
            del requests[name]
            waiting.pop(name, None)
    assert 1000 < found < asked < 2.5 * found


def completes(end: int, new: int, sinks: tuple[int, ...]) -> bool:
    return any((end - sink) // BLOCK > max(0, end - new - sink) // BLOCK and end > sink for sink in sinks)
