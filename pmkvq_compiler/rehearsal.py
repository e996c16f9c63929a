"""All passes and the printing of code, tried once right after the capture, so that a model whose operations cannot be
compiled is refused before it is loaded and measured. It works on a copy and takes a fraction of the capture's time."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence

from .errors import CompileError, first_line
from .model_source import model_source
from .passes.base import PassError, run_passes
from .passes.pipeline import pipeline
from .passes.program import AttentionSite, Program
from .runtime.plan import CachePlan, LayerPlan

TOKENS = 64
"""Tokens of the plan that is tried; all of them are kept as they are."""


def rehearse(program: Program, model_type: str) -> None:
    """Raise `CompileError` where the located `program` cannot be brought to a printed model."""
    tried = dataclasses.replace(
        program,
        graph_module=copy.deepcopy(program.graph_module),
        weights=dict(program.weights),
        constants=dict(program.constants),
        edits=[],
    )
    try:
        run_passes(tried, pipeline({}, {}, {}, _plan(program.sites)))
        compile(model_source(tried), "model.py", "exec")
    except (PassError, ValueError, TypeError, LookupError, AttributeError, NotImplementedError, SyntaxError) as error:
        raise CompileError(
            f"{model_type} computes something between its attentions that cannot be written as a compiled model "
            f"({first_line(error)}); choose another architecture"
        ) from error


def _plan(sites: Sequence[AttentionSite]) -> CachePlan:
    """Every layer unquantized, in float32."""
    layers = tuple(
        LayerPlan(
            num_key_value_heads=site.num_key_value_heads,
            key_head_dim=site.key_head_dim,
            value_head_dim=site.value_head_dim,
            key_bits=32,
            value_bits=32,
            key_axis="token",
            sink=0,
            window=TOKENS,
            block=16,
            sliding_window=site.sliding_window,
            stages=(),
            arena_bytes=4 * TOKENS * site.num_key_value_heads * (site.key_head_dim + site.value_head_dim),
        )
        for site in sites
    )
    return CachePlan("none", sum(layer.arena_bytes for layer in layers), TOKENS, 1, "float32", layers)
