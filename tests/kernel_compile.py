"""Compile a case's kernels for a device that need not be there."""

from __future__ import annotations

from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from .kernel_checks import Case, render_module

POINTERS = {
    "words": "*i16",
    "partial": "*fp32",
    "log_weights": "*fp32",
    "state": "*i32",
    "keys": "*fp16",
    "values": "*fp16",
    "rotation": "*fp32",
    **dict.fromkeys(("found", "half_queries", "half_keys", "half_values", "means", "others"), "*fp16"),
    **dict.fromkeys(("found_sums", "log_sums", "other_sums"), "*fp32"),
    **dict.fromkeys(("starts", "lengths", "page_table", "row_table", "ties", "order", "offsets"), "*i32"),
    "told": "*i64",
}
ROWS = {"queries", "rows", "new_keys", "new_values", "sinks", "out", "turned_queries", "turned_keys"}
STRIDES = {"strides", "query_strides", "key_strides", "value_strides"}


def signature(names: list[str], dtype: torch.dtype, constants: dict[str, Any]) -> dict[str, Any]:
    """What a kernel's arguments are: pointers, floats, strides, and integers for the rest."""
    types: dict[str, Any] = dict.fromkeys(names, "i32")
    types |= {name: kind for name, kind in POINTERS.items() if name in types}
    types |= dict.fromkeys(ROWS & set(names), "*bf16" if dtype == torch.bfloat16 else "*fp16")
    types |= dict.fromkeys({"scale"} & set(names), "fp32")
    types |= dict.fromkeys(STRIDES & set(names), ("i32",) * (2 if "heads" in names else 3))
    return types | dict.fromkeys(constants, "constexpr")


def compile_kernel(kernel: Any, case: Case, capability: int, warps: int, **constants: Any) -> Any:
    names = list(kernel.arg_names)
    types = signature(names, case.dtype, constants)
    aligned = {(at,): [["tt.divisibility", 16]] for at, name in enumerate(names) if str(types[name]).startswith("*")}
    values = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, types, values, aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})


def compile_case(case: Case, capability: int) -> dict[str, Any]:
    """Every kernel of a case at its final widths, by name; `append` in each of its modes."""
    module = render_module(case)
    widths = {"KEY_BITS": case.key_bits, "VALUE_BITS": case.value_bits}
    lowered = {"KEY_BITS": 16, "VALUE_BITS": 8, "KEY_TARGET": 8, "VALUE_TARGET": 8}
    work = {f"append {mode}": (module.append, 4, {**widths, "MODE": mode}) for mode in ("token", "blocks", "rows")}
    work |= {
        "lower": (module.lower, 8, lowered),
        "decode": (module.decode, 1, {**widths, "CELLS": 1, "PREFETCH": 2}),
        "merge": (module.merge, 2, {"SPLITS_PADDED": 32, "CHUNK": 32}),
        "unpack": (module.unpack, 4, {**widths, "ROWS": 64}),
        "halve": (module.halve, 4, {"TILE": 32}),
        "join": (module.join, 4, {"TILE": 32}),
        "prefill": (module.prefill, 4, {"FOUND": True, "REST": True, "TILE": 64, "STEP": 64}),
    }
    return {
        name: compile_kernel(kernel, case, capability, warps, **constants)
        for name, (kernel, warps, constants) in work.items()
    }


def compile_pages(case: Case, capability: int, exact: bool = False, highest: int = 1) -> dict[str, Any]:
    """Every kernel that reads pages of a case's layer, by name; `append_pages` in each of its modes. Pages have tiers
    up to the highest one."""
    module = render_module(case, paged=True)
    layer = {"KEY_BITS": case.key_bits, "VALUE_BITS": case.value_bits, "EXACT": exact}
    tiers = {"HIGHEST": highest, "tie_width": highest - 1}
    cells = tuple(min(2, case.block * case.value_bits * tier // 128) for tier in (1, 2, 4) if tier <= highest)
    decode = {"CELLS": cells, "PREFETCH": (2, 1, 0)[: len(cells)], "HIGHEST": highest}
    given = {} if highest > 1 else {"ties": None}
    work = {
        f"append {mode}": (
            module.append_pages,
            4,
            {**layer, **tiers, **given, "MODE": mode, "CHUNK": 1 if mode == "token" else 64},
        )
        for mode in ("token", "blocks", "rows")
    }
    work |= {
        "decode": (module.decode_pages, 1, {**layer, **decode, **({} if highest > 1 else {"order": None})}),
        "rotate": (module.rotate, 4, {"TILE": 16}),
        "merge": (module.merge_pages, 4, {"SPLITS_PADDED": 32, "CHUNK": 32}),
        "unpack": (module.unpack_pages, 4, {**layer, **tiers, **given, "ROWS": 64}),
        "prefill": (module.prefill_pages, 4, {"FOUND": not exact, "EXACT": exact, "TILE": 64, "STEP": 64}),
    }
    if highest > 1:
        widths = {"KEY_BITS": case.key_bits, "VALUE_BITS": case.value_bits}
        work |= {
            "sort": (module.sort_pages, 4, {**tiers, "CHUNK": 512}),
            "lower": (module.lower_pages, 8, {**widths, **tiers, "told_width": highest}),
        }
    return {
        name: compile_kernel(kernel, case, capability, warps, **constants)
        for name, (kernel, warps, constants) in work.items()
    }
