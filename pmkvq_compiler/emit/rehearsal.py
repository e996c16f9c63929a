"""Locates the attention of a captured program and tries the rest of the compile once on a copy.

So a model with an operation that cannot be compiled is refused before its weights are loaded and measured. The trial
takes a fraction of the capture's time.
"""

from __future__ import annotations

from pathlib import Path

import torch

from pmkvq_compiler.emit.model_source import model_source
from pmkvq_compiler.errors import CompileError, first_line
from pmkvq_compiler.passes.base import Pass, PassError, run_passes
from pmkvq_compiler.passes.compress_latents import CompressLatents, latents
from pmkvq_compiler.passes.locate_attention import LocateAttention
from pmkvq_compiler.passes.pipeline import pipeline
from pmkvq_compiler.passes.program import Program
from pmkvq_compiler.unquantized import exact_plan

TOKENS = 64
"""The length of the trial's cache in tokens, none of which is quantized."""
BLOCK = 16


def locate(program: Program, model_type: str, dump: Path | None = None) -> None:
    """Find the attention sites of a captured program. If a folder `dump` is given, the graph is written into it.

    Raises `CompileError` if the program cannot be printed as a Python model.
    """
    try:
        run_passes(program, analysis(program), dump)
        tried = program.copy()
        plan = exact_plan(program.cached_sites, TOKENS, 1, torch.float32, BLOCK, program.states)
        run_passes(tried, pipeline({}, {}, {}, plan))
        compile(model_source(tried), "model.py", "exec")
    except (PassError, ValueError, TypeError, LookupError, AttributeError, NotImplementedError, SyntaxError) as error:
        raise CompileError(
            f"{model_type} computes something besides its attention that cannot be compiled ({_cause(error)}); choose "
            f"another architecture"
        ) from error


def analysis(program: Program) -> list[Pass]:
    """The passes that find out what the caches of a captured program hold."""
    return [CompressLatents(), LocateAttention()] if latents(program) else [LocateAttention()]


def _cause(error: Exception) -> str:
    """The message of an error's root cause, or just the operation if that error refuses an operation."""
    while isinstance(error.__cause__, Exception):
        error = error.__cause__
    operation, *_ = first_line(error).partition(" is not allowed once")
    return operation
