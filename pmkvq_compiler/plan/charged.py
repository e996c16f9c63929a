"""What a plan takes of the budget: the bytes of its arenas, or what vLLM charges for the same sequences."""

from __future__ import annotations

from collections.abc import Sequence

from pmkvq_compiler.problem import Problem
from pmkvq_compiler.runtime.plan import LayerPlan
from pmkvq_compiler.runtime.vllm.layout import WINDOWS_WHILE_READING, Group, PagedLayer, pool_of

FED_AT_ONCE = 8192
"""Tokens that vLLM feeds in a step unless told otherwise; only pages of sliding windows depend on it."""

ROW_BLOCK = 16
"""Tokens of a block of rows, as a guess: how many fit depends on all layers."""


def charged_bytes(problem: Problem, layers: Sequence[LayerPlan]) -> int:
    """Bytes that the problem's sequences take. A plan for a server fits into its arenas and into vLLM's blocks."""
    arenas = sum(layer.arena_bytes for layer in layers)
    if not problem.serve:
        return arenas
    pool = pool_of([_paged(problem, layer) for layer in layers], problem.max_len)
    return max(arenas, pool.bytes_needed(problem.batch_size, problem.max_len, FED_AT_ONCE))


def share_of(problem: Problem, layer: LayerPlan) -> int:
    """Bytes that a layer adds to that, nearly: what blocks leave empty depends on which layers share them."""
    if not problem.serve:
        return layer.arena_bytes
    paged = _paged(problem, layer)
    pages = Group("pages", (0,), layer.block, layer.sliding_window).blocks(problem.max_len, FED_AT_ONCE)
    rows = Group("rows", (0,), ROW_BLOCK, paged.window).blocks(problem.max_len, 0)
    windows = problem.batch_size + WINDOWS_WHILE_READING - 1  # the prompt of one sequence is being read
    return problem.batch_size * pages * paged.page_bytes + windows * rows * ROW_BLOCK * paged.row_bytes


def _paged(problem: Problem, layer: LayerPlan) -> PagedLayer:
    return PagedLayer(layer, layer.num_key_value_heads, problem.dtype.itemsize)
