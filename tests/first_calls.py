"""Runs models as they are run while they are loaded: on a device without memory, to find their first kernels."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import torch

from pmkvq_compiler.passes.program import Program
from pmkvq_compiler.runtime.fused import PLAIN
from pmkvq_compiler.runtime.model import CompiledModel
from pmkvq_compiler.runtime.warm_up import NOWHERE, in_dtype, observed_calls

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def check_first_calls(model: CompiledModel, program: Program) -> None:
    """`model`, which was made of `program`, is observed whatever dtype it is loaded in."""
    constants = {one.name for one in program.constants.values()}
    functions: list[Any] = [model.hidden_states, model.logits]
    code: Any = SimpleNamespace(bind=lambda weights: [partial(one.func, weights) for one in functions])
    for dtype in DTYPES:
        empty = {
            name: torch.empty_like(x, dtype=x.dtype if name in constants else dtype, device=NOWHERE)
            for name, x in model.weights.items()
        }
        for calls in observed_calls(code, empty, (), in_dtype(model.plan, dtype), PLAIN, (1,), (1, 2)):
            assert {(one.q.shape[2], one.q.dtype) for one in calls} == {(1, dtype), (2, dtype)}
