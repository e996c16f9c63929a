"""Pages are precise while blocks are idle, and nothing else changes: not what is admitted, nor what is right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .engines import Alone, Served, all_free, engine, greedy, random_prompts

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
