"""Attention is located, and all that follows tried once, right after the capture: a model whose operations cannot be
compiled is refused before it is loaded and measured. The trial works on a copy, in a fraction of the capture's time."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import torch

from pmkvq_compiler.emit.model_source import model_source
from pmkvq_compiler.errors import CompileError, first_line
from pmkvq_compiler.passes.base import PassError, run_passes
from pmkvq_compiler.passes.locate_attention import LocateAttention
from pmkvq_compiler.passes.pipeline import pipeline
from pmkvq_compiler.passes.program import Program
from pmkvq_compiler.unquantized import exact_plan

TOKENS = 64
"""Tokens of the plan that is tried; all of them are kept as they are."""
BLOCK = 16


def locate(program: Program, model_type: str, dump: Path | None = None) -> None:
    """Find the attention sites of a captured program; the graph is written into the folder `dump`, if one is given.

    Raises `CompileError` where the program cannot be brought to a printed model.
    """
    try:
        run_passes(program, [LocateAttention()], dump)
        tried = dataclasses.replace(
            program,
            graph_module=copy.deepcopy(program.graph_module),
            weights=dict(program.weights),
            constants=dict(program.constants),
            edits=[],
            history=[*program.history],
        )
        run_passes(tried, pipeline({}, {}, {}, exact_plan(program.sites, TOKENS, 1, torch.float32, BLOCK)))
        compile(model_source(tried), "model.py", "exec")
    except (PassError, ValueError, TypeError, LookupError, AttributeError, NotImplementedError, SyntaxError) as error:
        raise CompileError(
            f"{model_type} computes something beside its attention that cannot be written as a compiled model "
            f"({_cause(error)}); choose another architecture"
        ) from error


def _cause(error: Exception) -> str:
    """What the last error of a chain says; of an operation that no graph may have, which it is."""
    while isinstance(error.__cause__, Exception):
        error = error.__cause__
    operation, *_ = first_line(error).partition(" is not allowed once")
    return operation
