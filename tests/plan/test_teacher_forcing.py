"""Teacher forcing under a plan gives what the runtime's cache gives, step by step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import pmkvq_compiler.runtime as runtime
from pmkvq_compiler.calibrate.attention_hook import ATTENTION, observed, run
from pmkvq_compiler.calibrate.storage import load_calibration
from pmkvq_compiler.compile import compile_model
from pmkvq_compiler.options import CompileOptions
from pmkvq_compiler.passes.base import run_passes
from pmkvq_compiler.passes.locate_attention import LocateAttention
from pmkvq_compiler.plan.rerank import best_plans
from pmkvq_compiler.plan.solution import Folds
from pmkvq_compiler.plan.teacher_forcing import progressive
from pmkvq_compiler.problem import resolve
from pmkvq_compiler.source.source import open_source
from tests.folders import TEXT, model_folder
from tests.fuzz import LONG_ONLY
from tests.programs import captured_once

MAX_LEN, PROMPTS = 448, (130, 75)


def silent(*_: Any) -> None:
    """Progress that nobody watches."""


@pytest.mark.parametrize(
    ("recipe", "budget"),
    [
        ("best", "62%"),
        pytest.param("best", "75%", marks=LONG_ONLY),
        pytest.param("pm-kvq", "65%", marks=LONG_ONLY),
        pytest.param("kivi", "70%", marks=LONG_ONLY),
        pytest.param("rotation", "55%", marks=LONG_ONLY),
    ],
)
def test_every_step_sees_the_cache_as_the_runtime_has_it(tmp_path: Path, recipe: str, budget: str) -> None:
    folder = model_folder(tmp_path / "model")
    (tmp_path / "text.txt").write_text(TEXT)
    options = CompileOptions(
        model=str(folder),
        output=tmp_path / "artifact",
        budget=budget,
        max_len=MAX_LEN,
        batch_size=1,
        recipe=recipe,
        calib=str(tmp_path / "text.txt"),
        calib_samples=2,
        calib_len=256,
        window=None if recipe == "best" else 64,
        block=32,
        device="cpu",
        dtype="float32",
    )
    result = compile_model(options, silent)
    assert result.path is not None
    compiled = runtime.load(result.path)

    source = open_source(str(folder), "float32")
    program = captured_once(source.config)
    run_passes(program, [LocateAttention()])
    problem = resolve(options, program.sites, MAX_LEN, source.dtype)
    (path,) = tmp_path.glob("*.calibration.safetensors")
    calibration = load_calibration(path)
    (best,) = best_plans(source, [problem], calibration, silent)
    solution = best.solution
    assert solution.plan == result.plan

    torch.manual_seed(1)
    texts = torch.randint(3, 128, (2, MAX_LEN))
    model = source.load_model(ATTENTION).requires_grad_(False)
    folds = Folds.of(solution, calibration)
    with torch.no_grad(), observed(progressive(solution.plan, folds, PROMPTS)):
        forced = run(model, texts, torch.arange(MAX_LEN).unsqueeze(0))
    for row, prompt in enumerate(PROMPTS):
        cache = compiled.new_cache(batch_size=1, max_len=MAX_LEN)
        logits = [compiled(texts[row : row + 1, :prompt], cache)[0]]
        logits += [compiled(texts[row : row + 1, step : step + 1], cache)[0] for step in range(prompt, MAX_LEN)]
        difference = torch.cat(logits) - forced[row]
        assert difference.norm() / forced[row].norm() < 2e-3, "rounding of codes on a boundary may differ, no more"
