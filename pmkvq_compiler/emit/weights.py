"""Writes the weights of an artifact: every tensor of the source is edited and streamed into safetensors files."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pmkvq_compiler.emit.artifact import save_tensors
from pmkvq_compiler.emit.expressions import MODEL_DTYPE
from pmkvq_compiler.errors import CompileError
from pmkvq_compiler.passes.program import Program
from pmkvq_compiler.progress import Progress
from pmkvq_compiler.source.checkpoint import INDEX_FILE


@dataclass(frozen=True)
class _Planned:
    """A tensor of the artifact's checkpoint: its name, shape and dtype."""

    name: str
    shape: torch.Size
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize


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
    `model.safetensors`, or into shards of up to `max_shard_bytes` with an index. Only one shard is in memory at a time.

    Raises `CompileError` if a tensor does not have the shape that the configuration says, or is not finite.
    """
    shards = _plan_shards(program, dtype, max_shard_bytes)
    names = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    if len(shards) == 1:
        names = ["model.safetensors"]
    done, total = 0, sum(len(shard) for shard in shards)
    for name, shard in zip(names, shards, strict=True):
        tensors = {}
        for planned in shard:
            tensors[planned.name] = _edited(planned, read(planned.name), program)
            done += 1
            progress("weights", done, total)
        save_tensors(tensors, folder / name)
        del tensors
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


def _plan_shards(program: Program, dtype: torch.dtype, max_shard_bytes: int) -> list[list[_Planned]]:
    """The tensors of each shard, in the order of the graph. A tensor that is larger than a shard gets its own shard."""
    shards: list[list[_Planned]] = [[]]
    for node in program.graph.find_nodes(op="placeholder"):
        if node.name not in program.weights:
            continue
        captured = node.meta["val"].dtype
        planned = _Planned(
            program.weights[node.name], node.meta["val"].shape, dtype if captured == MODEL_DTYPE else captured
        )
        if shards[-1] and sum(one.bytes for one in shards[-1]) + planned.bytes > max_shard_bytes:
            shards.append([])
        shards[-1].append(planned)
    return shards


def _edited(planned: _Planned, value: Tensor, program: Program) -> Tensor:
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
    if stored.is_floating_point() and not bool(torch.isfinite(stored).all()):
        where = "the checkpoint" if not bool(torch.isfinite(value).all()) else str(planned.dtype).removeprefix("torch.")
        raise CompileError(
            f"weight {planned.name} holds NaN or infinity in {where}; fetch the checkpoint again, or choose another "
            f"--dtype"
        )
    return stored.contiguous()
