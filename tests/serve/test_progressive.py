"""Pages are precise while blocks are idle, and nothing else changes: not what is admitted, nor what is right."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest

from tests.fuzz import rounds

from .engines import Served, all_free, engine, greedy, random_prompts
from .simulation import MAX_FED, VOCABULARY, Arrival, Simulation

PROGRESSIVE = {"additional_config": {"pmkvq": {"progressive": True}}}
PLAN: dict[str, Any] = {"recipe": "uniform", "budget": "70%"}
PROMPTS = random_prompts((7, 130, 300, 513, 777))


def test_an_idle_pool_gives_the_text_of_the_wide_format(served_tiny: Served) -> None:
    """Codes of 2 bits and three planes are those of 8 bits."""
    found: dict[str, list[list[int]]] = {}
    for name, bits, options in (("8 bits", 8, {}), ("2 bits", 2, {}), ("progressive", 2, PROGRESSIVE)):
        with engine(served_tiny(**PLAN, bits=(bits,)), **options) as llm:
            found[name] = greedy(llm, PROMPTS, 100)
            assert all_free(llm)
    assert found["progressive"] == found["8 bits"]
    assert found["progressive"] != found["2 bits"]


# ---- the scheduler with a worker that has no model ----


SIMULATED: dict[str, dict[str, Any]] = {
    "two widths": {"block": 32, "window": 32, "budget": "35%"},
    "sliding layers": {
        "model_type": "gemma2",
        "overrides": {"sliding_window": 100, "num_hidden_layers": 4, "query_pre_attn_scalar": 32},
        "block": 32,
        "window": 32,
        "budget": "40%",
    },
}


@pytest.mark.parametrize("name", SIMULATED)
def test_random_schedules_lose_no_block_and_read_no_foreign_one(served_tiny: Served, name: str) -> None:
    """Requests come, end and are aborted at random in small pools, with and without a prefix cache."""
    simulation = Simulation(served_tiny(**SIMULATED[name]))
    preempted, planes = {False: 0, True: 0}, 0
    for seed in range(rounds(60, 5000)):
        rng = random.Random(seed)
        arrivals, options = list(random_arrivals(rng)), random_options(rng, simulation.least)
        plain = simulation.run(arrivals, progressive=False, **options)
        found = simulation.run(arrivals, progressive=True, **options)
        if not options["caching"]:
            assert found.steps == plain.steps, f"schedule {seed}: vLLM would have decided otherwise"
        preempted[False] += plain.preemptions
        preempted[True] += found.preemptions
        planes += found.planes_read
    print(preempted, planes)
    assert preempted[True] > 10
    assert planes > 1000


def random_arrivals(rng: random.Random) -> Iterator[Arrival]:
    """Requests that often begin as others do."""
    beginnings = [tuple(rng.randrange(VOCABULARY) for _ in range(rng.randrange(30, 250))) for _ in range(2)]
    for number in range(rng.randrange(2, 9)):
        shared = rng.choice(beginnings)[: rng.randrange(1, 250)] if rng.random() < 0.7 else ()
        more = tuple(rng.randrange(VOCABULARY) for _ in range(rng.randrange(1, 60)))
        step = rng.randrange(40)
        aborted = step + rng.randrange(1, 60) if rng.random() < 0.15 else None
        yield Arrival(str(number), step, shared + more, rng.choice((5, 40, 90)), aborted)


def random_options(rng: random.Random, least: int) -> dict[str, Any]:
    """A pool that is too small for all of them, or not."""
    blocks = int(least * rng.choice((1, 1.1, 1.3, 1.6, 2, 4))) + rng.randrange(5)
    flags = {"caching": rng.random() < 0.6, "ahead": rng.random() < 0.5}
    return {"blocks": blocks, "fed": rng.choice((20, 50, MAX_FED)), **flags}
