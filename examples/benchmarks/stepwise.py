"""Decodes chains step by step with a compiled artifact, for `quality.py --decode` to compare its scores with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from pmkvq_compiler import runtime
from pmkvq_compiler.compile import compile_model
from pmkvq_compiler.options import CompileOptions
from pmkvq_compiler.runtime.plan import CachePlan


def first_errors(
    options: CompileOptions, plan: CachePlan, items: Sequence[tuple[list[int], list[int]]], device: str
) -> list[int | None]:
    """Compile a model with `options` and decode each (prompt, right chain) greedily, one at a time. Returns the step of
    the first wrong token of each chain, None where all are right.

    The artifact runs in its own dtype with the default backend of `device`. Raises `RuntimeError` where the compiler's
    plan is not `plan`.
    """
    with TemporaryDirectory() as folder:
        options = replace(options, output=Path(folder) / "artifact")
        result = compile_model(options, lambda *_: None)
        if result.plan.layers != plan.layers:
            raise RuntimeError("the artifact's plan is not the plan that was scored")
        assert result.path is not None
        model = runtime.load(result.path, device=device)
        return [first_error(model, prompt, chain) for prompt, chain in items]


@torch.inference_mode()
def first_error(model: runtime.CompiledModel, prompt: list[int], chain: list[int]) -> int | None:
    """The first step at which the model's greedy continuation of a prompt differs from the right chain."""
    found = model.generate(torch.tensor([prompt]), max_new_tokens=len(chain))[0, len(prompt) :].tolist()
    return next((step for step, token in enumerate(chain) if found[step : step + 1] != [token]), None)
