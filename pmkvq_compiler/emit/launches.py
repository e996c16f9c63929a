"""Finds every kernel launch that the runtime can make for an artifact, by running it on tensors without memory."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor

from pmkvq_compiler.emit.kernel_source import TUNING
from pmkvq_compiler.emit.package import CONSTANTS
from pmkvq_compiler.runtime.cubins import ALIGNMENT, argument_type, variant
from pmkvq_compiler.runtime.fused_kernels import FUSED, FusedKernels
from pmkvq_compiler.runtime.generate import PREFILL_CHUNK
from pmkvq_compiler.runtime.kernels import LayerKernels
from pmkvq_compiler.runtime.load import import_generated
from pmkvq_compiler.runtime.plan import CachePlan
from pmkvq_compiler.runtime.tuning import read_tunings
from pmkvq_compiler.runtime.warm_up import Call, attend, observed_calls, roomy
from pmkvq_compiler.runtime.weights import empty_tensors


@dataclass
class Launched:
    """A kernel with the types of its arguments, and its constants.

    `divisible` are the places of addresses and strides that were multiples of 16 in every launch. Places are counted
    with the tuples among the arguments flattened.
    """

    kernel: str
    types: list[Any]
    keywords: dict[str, Any]
    divisible: set[int]


@dataclass
class Recorder:
    """Takes the place of a module of kernels and records launches instead of making them."""

    module: ModuleType
    launches: dict[str, Launched] = field(default_factory=dict)

    def __getattr__(self, name: str) -> Any:
        from triton.runtime.jit import KernelInterface

        found = getattr(self.module, name)
        return RecordedKernel(name, self.launches) if isinstance(found, KernelInterface) else found

    def constants(self) -> dict[str, Any]:
        from triton.language import constexpr

        return {name: value.value for name, value in vars(self.module).items() if isinstance(value, constexpr)}


@dataclass(frozen=True)
class RecordedKernel:
    name: str
    launches: dict[str, Launched]

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return self.record

    def record(self, *arguments: Any, **keywords: Any) -> None:
        types = [argument_type(value) for value in arguments]
        divisible = {at for at, value in enumerate(_places(arguments)) if value is not None and not value % ALIGNMENT}
        launched = Launched(self.name, types, keywords, divisible)
        self.launches.setdefault(variant(self.name, types, keywords), launched).divisible &= divisible


def _places(arguments: Sequence[Any]) -> list[int | None]:
    """For arguments with tuples flattened: the byte offset of a tensor, a stride in a tuple, None for anything else."""
    places: list[int | None] = []
    for value in arguments:
        if isinstance(value, Tensor):
            places.append(int(value.storage_offset()) * value.itemsize)
        else:
            places += value if isinstance(value, tuple) else [None]
    return places


def launches_of(package: Path, checkpoint: Sequence[Path]) -> dict[str, Recorder]:
    """Every launch that the runtime can make, by the names of the kernels' files."""
    plan: CachePlan = import_generated(package / "plan.py").PLAN
    names = import_generated(package / "kernels" / "layers.py").KERNELS
    files = dict.fromkeys((*names, FUSED))
    recorders = {name: Recorder(import_generated(package / "kernels" / f"{name}.py")) for name in files}
    tunings = read_tunings((package / "kernels" / TUNING).read_text(encoding="utf-8"))
    seen = set()
    code, weights = import_generated(package / "model.py"), dict(empty_tensors([*checkpoint, package / CONSTANTS]))
    ops = FusedKernels(recorders[FUSED])  # type: ignore[arg-type]
    calls = observed_calls(code, weights, code.JOINED, plan, ops, (1, 2), (1, 3, PREFILL_CHUNK))
    for name, layer, of_layer in zip(names, plan.layers, calls, strict=True):
        alike = name, dataclasses.replace(layer, arena_bytes=0), str([_shape(call) for call in of_layer])
        if alike in seen:
            continue
        seen.add(alike)
        for tuning in tunings.values():
            _run_layer(LayerKernels(recorders[name], tuning), roomy(plan, layer), of_layer)  # type: ignore[arg-type]
    return recorders


def _shape(call: Call) -> list[Any]:
    tensors = [tensor for tensor in (call.q, call.k, call.v, call.sinks) if tensor is not None]
    return [(tensor.dtype, tensor.shape, tensor.stride(), tensor.storage_offset()) for tensor in tensors]


def _run_layer(kernels: LayerKernels, plan: CachePlan, calls: Sequence[Call]) -> None:
    """Make every launch that caches of the one layer in `plan` can need."""
    stages = range(max(1, len(plan.layers[0].stages)))
    for call in calls:
        for stage in stages:
            cache = attend(kernels, plan, plan.max_len, stage, call)
            store = cache.layers[0]
            if call.q.shape[2] > 1:  # as if nothing were history, and the whole cache, unpacked in the most pieces
                for length in (0, cache.max_len):
                    store.seek([length] * len(call.q), stage)
                    kernels.read(
                        call.q, (call.k, call.v), store, cache.new_tokens, call.scale, call.softcap, call.sinks
                    )  # fmt: skip
            if stage + 1 < len(stages) and store.live_blocks(0):
                kernels.lower(store, cache.state)
        if call.q.shape[2] == 1:  # a shorter cache is decoded in fewer parts
            for max_len in _lengths(plan.max_len):
                attend(kernels, plan, max_len, stages[-1], call)


def _lengths(max_len: int) -> Iterator[int]:
    """Lengths from 1 to `max_len`. They lie so close that the number of parts in which a cache is decoded takes every
    power of two."""
    length = 1
    while length < max_len:
        yield length
        length += max(16, length // 16)
    yield max_len


def imported(file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"{file.parent.parent.name}_{file.stem}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
