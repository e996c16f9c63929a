"""The environment that vLLM wants, before anything imports it; and artifacts for it. `make test-serve` sets it up."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import random
from pathlib import Path
from typing import Any

import pytest

from pmkvq_compiler.compile import compile_model
from pmkvq_compiler.options import CompileOptions
from tests.conftest import silent, token_lines
from tests.models import tiny_folder

from .engines import (
    REASONER,
    SETTINGS,
    SHAPE,
    Alone,
    Served,
    all_free,
    engine,
    greedy,
    ledger,
    most_entries,
    token_ids,
)

# One process, so that the scheduler can be looked at; the tests of servers start others. oneDNN would keep the last
# 1,024 matrix products that it has compiled, 0.2 MB each, and memory would grow for an hour, whoever served.
os.environ |= {**SETTINGS, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "WARNING"}
os.environ |= {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "16"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Without vLLM these tests cannot run, and say so."""
    if importlib.util.find_spec("vllm") is None:
        for item in items:
            if Path(__file__).parent in item.path.parents:
                item.add_marker(pytest.mark.skip(reason="vLLM is not installed here; run make test-serve"))


@pytest.fixture(scope="session")
def served_tiny(tmp_path_factory: pytest.TempPathFactory) -> Served:
    """`served_tiny("llama", budget="25%")`: an artifact; its source lies in `source` beside it."""
    made: dict[str, Path] = {}

    def compile_once(model_type: str = "llama", overrides: dict[str, Any] | None = None, **options: Any) -> Path:
        key = json.dumps([model_type, overrides, options], sort_keys=True)
        if key not in made:
            folder = tmp_path_factory.mktemp(model_type)
            tiny_folder(folder / "source", model_type, **{**SHAPE, **(overrides or {})})
            calib = str(token_lines(folder / "tokens.jsonl", count=300))
            chosen = {"budget": "25%", "max_len": 1400, "calib_samples": 2, "calib_len": 192, **options}
            made[key] = folder / "artifact"
            compile_model(CompileOptions(str(folder / "source"), made[key], calib=calib, **chosen), silent)
        return made[key]

    return compile_once


@pytest.fixture(scope="session")
def alone() -> Alone:
    """`alone(artifact, prompts, new=24)`: what each prompt gives when it is the only one, fed at once."""
    known: dict[str, list[int]] = {}

    def ask(artifact: Path, prompts: list[list[int]], new: int = 24) -> list[list[int]]:
        keys = [json.dumps([str(artifact), prompt, new]) for prompt in prompts]
        unknown = {key: prompt for key, prompt in zip(keys, prompts, strict=True) if key not in known}
        if unknown:
            with engine(artifact, max_num_batched_tokens=2048) as llm:
                known.update(zip(unknown, greedy(llm, [*unknown.values()], new, together=False), strict=True))
                assert all_free(llm)
        return [known[key] for key in keys]

    return ask


@pytest.fixture(scope="session")
def reasoner(tmp_path_factory: pytest.TempPathFactory) -> Served:
    """`reasoner(budget="2.8bits")`: the project's own reasoner as an artifact."""
    from transformers import AutoTokenizer

    tokenizer, rng = AutoTokenizer.from_pretrained(REASONER / "model"), random.Random(2)
    folder = tmp_path_factory.mktemp("reasoner")  # of all artifacts, which then share what is measured
    texts = [[*itertools.chain(*token_ids(tokenizer, *ledger(rng, most_entries(1000))))] for _ in range(8)]
    (folder / "calib.jsonl").write_text("".join(json.dumps({"input_ids": text}) + "\n" for text in texts))
    made: dict[str, Path] = {}

    def compile_once(**options: Any) -> Path:
        key = json.dumps(options, sort_keys=True)
        if key not in made:
            chosen = {"max_len": 2048, "calib_samples": 8, "calib_len": 900, **options}
            made[key] = folder / f"artifact_{len(made)}"
            calib = str(folder / "calib.jsonl")
            compile_model(CompileOptions(str(REASONER / "model"), made[key], calib=calib, **chosen), silent)
        return made[key]

    return compile_once
