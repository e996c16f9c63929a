"""Writes the weights of an artifact: every tensor of the source is edited and streamed into safetensors files."""

from __future__ import annotations

import json
import math
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from pmkvq_compiler.emit.artifact import METADATA
from pmkvq_compiler.emit.expressions import MODEL_DTYPE
from pmkvq_compiler.emit.tensor_file import TensorSpec, write_tensors
from pmkvq_compiler.errors import CompileError
from pmkvq_compiler.passes.program import Program
from pmkvq_compiler.progress import Progress
from pmkvq_compiler.source.checkpoint import INDEX_FILE
from pmkvq_compiler.source.finite import reach

SHARDS_AT_ONCE = 4
"""How many files are written at the same time, on a machine with as many cores."""


def write_weights(
    program: Program,
    read: Callable[[str], Tensor],
    folder: Path,
    dtype: torch.dtype,
    max_shard_bytes: int,
    progress: Progress,
) -> dict[str, int]:
    """Read every tensor, apply its edits in float64 and write it into `folder`; returns the bytes of each weight file.

    Tensors are stored in `dtype`, except for those that the model always keeps in float32. They go into
    `model.safetensors`, or into shards of up to `max_shard_bytes` with an index. Several shards are written at the same
    time, and each has one tensor in memory.

    Raises `CompileError` if a tensor does not have the shape that the configuration says, or is not finite.
    """
    shards = _plan_shards(program, dtype, max_shard_bytes)
    names = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    if len(shards) == 1:
        names = ["model.safetensors"]
    done, total, lock = 0, sum(len(shard) for shard in shards), threading.Lock()

    def value(spec: TensorSpec) -> Tensor:
        nonlocal done
        tensor = _edited(spec, read(spec.name), program)
        with lock:
            done += 1
            progress("weights", done, total)
        return tensor

    def write(name: str, shard: list[TensorSpec]) -> None:
        write_tensors(folder / name, shard, value, METADATA)

    with ThreadPoolExecutor(min(SHARDS_AT_ONCE, os.cpu_count() or 1)) as pool:
        for _ in pool.map(write, names, shards):
            pass
    sizes = {name: sum(planned.bytes for planned in shard) for name, shard in zip(names, shards, strict=True)}
    if len(shards) > 1:
        files = {planned.name: name for name, shard in zip(names, shards, strict=True) for planned in shard}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": files}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return sizes


def weight_bytes(program: Program, dtype: torch.dtype) -> int:
    """The bytes of all tensors of the artifact's checkpoint."""
    (shard,) = _plan_shards(program, dtype, sys.maxsize)
    return sum(planned.bytes for planned in shard)


def _plan_shards(program: Program, dtype: torch.dtype, max_shard_bytes: int) -> list[list[TensorSpec]]:
    """The tensors of each shard, in the order of the graph. A tensor that is larger than a shard gets its own shard."""
    shards: list[list[TensorSpec]] = [[]]
    for node in program.graph.find_nodes(op="placeholder"):
        if node.name not in program.weights:
            continue
        captured = node.meta["val"].dtype
        planned = TensorSpec(
            program.weights[node.name], node.meta["val"].shape, dtype if captured == MODEL_DTYPE else captured
        )
        if shards[-1] and sum(one.bytes for one in shards[-1]) + planned.bytes > max_shard_bytes:
            shards.append([])
        shards[-1].append(planned)
    return shards


def _edited(planned: TensorSpec, value: Tensor, program: Program) -> Tensor:
    """The tensor as it is stored: edited, and in its final dtype. Raises `CompileError`, see `write_weights`."""
    if value.shape != planned.shape:
        raise CompileError(
            f"weight {planned.name} has shape {list(value.shape)}, but the configuration says {list(planned.shape)}; "
            f"fetch config.json and the weights of the same model"
        )
    edits = [edit for edit in program.edits if edit.tensor == planned.name]
    if edits:
        value = value.to(torch.float64)
    for edit in edits:
        value = edit.apply(value)
    stored = value.to(planned.dtype)
    if not math.isfinite(reach(stored)):
        where = str(planned.dtype).removeprefix("torch.") if math.isfinite(reach(value)) else "the checkpoint"
        raise CompileError(
            f"weight {planned.name} holds NaN or infinity in {where}; fetch the checkpoint again, or choose another "
            f"--dtype"
        )
    return stored.contiguous()
