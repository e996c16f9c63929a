"""Kernels compiled ahead of time, for devices that need not be there.

What to compile is not listed anywhere: the artifact's own launching code runs, on tensors without memory, through
whatever a cache can go through, and every launch that it asks for is compiled. The result goes into the artifact, where
`pmkvq_compiler.runtime.cubins` finds it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
import multiprocessing
import os
import re
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from pmkvq_compiler.children import isolated
from pmkvq_compiler.errors import CompileError, UsageError
from pmkvq_compiler.kernel_source import TUNING
from pmkvq_compiler.options import TARGETS
from pmkvq_compiler.runtime.cache import Cache
from pmkvq_compiler.runtime.cubins import ALIGNMENT, INDEX, argument_type, flat, variant
from pmkvq_compiler.runtime.errors import InputError
from pmkvq_compiler.runtime.generate import PREFILL_CHUNK
from pmkvq_compiler.runtime.kernels import LayerKernels, check_kernels, read_tunings
from pmkvq_compiler.runtime.load import DTYPES, import_generated
from pmkvq_compiler.runtime.plan import CachePlan, LayerPlan, sequence_bytes

Progress = Callable[[str, int, int], None]
"""Called with a stage's name, what is done of it and what there is to do."""

NOWHERE = torch.device("meta")


# ---- what can be asked for ----


def check_targets(targets: Sequence[str]) -> None:
    """Raises `UsageError` where kernels cannot be compiled for the targets on this machine."""
    for target in targets:
        if target not in TARGETS:
            raise UsageError(f"--aot target {target!r} is not known; choose from {', '.join(TARGETS)}")
    if targets and importlib.util.find_spec("triton") is None:
        raise UsageError(
            "--aot needs the package triton, which is not installed; run `pip install triton` or leave --aot out"
        )


def check_plan(plan: CachePlan) -> None:
    """Raises `UsageError` where there are no kernels for the plan."""
    try:
        for layer in plan.layers:
            check_kernels(layer)
    except InputError as error:
        raise UsageError(f"--aot compiles Triton kernels, and {error}, or leave --aot out") from error


# ---- what is launched ----


@dataclass
class Launched:
    """A kernel with the types of its arguments and its constants.

    `divisible` are the places, among arguments one by one, of addresses and strides that were always multiples of 16.
    """

    kernel: str
    types: list[Any]
    keywords: dict[str, Any]
    divisible: set[int]


@dataclass
class Recorder:
    """Stands for a module of kernels and keeps what is launched."""

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
    """Of arguments one by one: bytes of a tensor before its first number, strides, None for everything else."""
    places: list[int | None] = []
    for value in arguments:
        if isinstance(value, Tensor):
            places.append(int(value.storage_offset()) * value.itemsize)
        else:
            places += value if isinstance(value, tuple) else [None]
    return places


@dataclass
class Call:
    """What the model hands to the attention of a layer."""

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    sinks: Tensor | None


@dataclass
class Observer:
    """Stands for the kernels of a layer while the model runs."""

    calls: list[Call]

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, cache: Cache, layer: int, scale: float, sinks: Tensor | None
    ) -> Tensor:
        self.calls.append(Call(q, k, v, scale, sinks))
        return q.new_empty(*q.shape[:3], v.shape[-1])


def launches_of(package: Path, checkpoint: Sequence[Path]) -> dict[str, Recorder]:
    """Every launch that the runtime can ask for, by file of kernels."""
    plan: CachePlan = import_generated(package / "plan.py").PLAN
    names = import_generated(package / "kernels" / "layers.py").KERNELS
    recorders = {name: Recorder(import_generated(package / "kernels" / f"{name}.py")) for name in dict.fromkeys(names)}
    tunings = read_tunings((package / "kernels" / TUNING).read_text(encoding="utf-8"))
    seen = set()
    calls = _observed_calls(package, checkpoint, plan)
    for name, layer, of_layer in zip(names, plan.layers, calls, strict=True):
        alike = name, dataclasses.replace(layer, arena_bytes=0), str([_shape(call) for call in of_layer])
        if alike in seen:
            continue
        seen.add(alike)
        for tuning in tunings.values():
            _run_layer(LayerKernels(recorders[name], tuning), _roomy(plan, layer), of_layer)  # type: ignore[arg-type]
    return recorders


def _shape(call: Call) -> list[Any]:
    tensors = [tensor for tensor in (call.q, call.k, call.v, call.sinks) if tensor is not None]
    return [(tensor.dtype, tensor.shape, tensor.stride(), tensor.storage_offset()) for tensor in tensors]


def _observed_calls(package: Path, checkpoint: Sequence[Path], plan: CachePlan) -> list[list[Call]]:
    """What the generated model hands to each layer's attention: for one token and for more, of one sequence and two."""
    calls: list[list[Call]] = [[] for _ in plan.layers]
    hidden_states, _ = import_generated(package / "model.py").bind(
        _weights_without_numbers([*checkpoint, package / "constants.safetensors"])
    )
    whole = _roomy(plan, *plan.layers)
    with torch.inference_mode():
        for batch in (1, 2):
            for count in sorted({min(count, plan.max_len) for count in (1, 3, PREFILL_CHUNK)}):
                cache = Cache(whole, batch, None, DTYPES[plan.dtype], NOWHERE)
                cache.kernels = [Observer(of_layer) for of_layer in calls]  # type: ignore[misc]
                cache.begin([slice(0, count)] * batch)
                ids = torch.zeros(batch, count, dtype=torch.int64, device=NOWHERE)
                hidden_states(ids, ids, cache)
    return calls


def _weights_without_numbers(files: Sequence[Path]) -> dict[str, Tensor]:
    weights = {}
    for path in files:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - it is no dictionary
                part = file.get_slice(name)
                some = part[:0] if part.get_shape() else file.get_tensor(name)
                weights[name] = torch.empty(part.get_shape(), dtype=some.dtype, device=NOWHERE)
    return weights


def _roomy(plan: CachePlan, *layers: LayerPlan) -> CachePlan:
    """A plan of these layers with room for two sequences at the widest codes: caches of fewer sequences or tokens than
    the plan's stay wide for longer."""
    itemsize = DTYPES[plan.dtype].itemsize
    roomy = (
        dataclasses.replace(layer, arena_bytes=2 * sequence_bytes(layer, plan.max_len, itemsize, stage=0))
        for layer in layers
    )
    return dataclasses.replace(plan, batch_size=2, layers=tuple(roomy))


def _run_layer(kernels: LayerKernels, plan: CachePlan, calls: Sequence[Call]) -> None:
    """Launch whatever caches of the one layer in `plan` can ask for."""
    stages = range(max(1, len(plan.layers[0].stages)))
    for call in calls:
        for stage in stages:
            cache = _attend(kernels, plan, plan.max_len, stage, call)
            store = cache.layers[0]
            if stage + 1 < len(stages) and store.live_blocks(0):
                kernels.shrink(cache, store, stage + 1)
        if call.q.shape[2] == 1:  # a shorter cache is decoded in fewer parts
            for max_len in _lengths(plan.max_len):
                _attend(kernels, plan, max_len, stages[-1], call)


def _lengths(max_len: int) -> Iterator[int]:
    """Lengths so close that no power of two is left out among the parts that caches of them are decoded in."""
    length = 1
    while length < max_len:
        yield length
        length += max(16, length // 16)
    yield max_len


def _attend(kernels: LayerKernels, plan: CachePlan, max_len: int, stage: int, call: Call) -> Cache:
    """Feed a call to a cache at a stage whose window is full, so that a block leaves it where one ever does."""
    batch, _, count, _ = call.q.shape
    cache = Cache(plan, batch, max_len, DTYPES[plan.dtype], NOWHERE, [kernels])
    store = cache.layers[0]
    rows = min(store.plan.sink + store.plan.window, max_len - count)
    store.stage, store.rows = stage, [rows] * batch
    cache.length = [rows] * batch
    cache.begin([slice(0, count)] * batch)
    kernels.attend(call.q, call.k, call.v, cache, 0, call.scale, call.sinks)
    return cache


# ---- compile ----


@dataclass(frozen=True)
class Work:
    """A launch to be compiled: of the kernel in `file`, for a target."""

    file: Path
    launched: Launched
    target: str


@dataclass(frozen=True)
class Cubin:
    """Machine code. `hidden` parameters that Triton adds come after those of the kernel; they are null pointers."""

    code: bytes
    symbol: str
    shared: int
    num_warps: int
    hidden: int

    @property
    def name(self) -> str:
        return hashlib.sha256(self.code).hexdigest()[:16] + ".cubin"


def write_cubins(package: Path, checkpoint: Sequence[Path], targets: Sequence[str], progress: Progress) -> list[Path]:
    """Compile every kernel of the artifact in `package` for the targets, into `kernels/aot/` there; returns the files.

    Raises `CompileError` where a kernel cannot be compiled.
    """
    recorders = launches_of(package, checkpoint)
    jobs = {
        (target, name, key): Work(package / "kernels" / f"{name}.py", launched, target)
        for target in targets
        for name, recorder in recorders.items()
        for key, launched in recorder.launches.items()
    }
    cubins = compile_all(jobs, progress)
    files = {target: package / "kernels" / "aot" / f"{target}.zip" for target in targets}
    (package / "kernels" / "aot").mkdir()
    for target, file in files.items():
        of_target = {(name, key): cubin for (other, name, key), cubin in cubins.items() if other == target}
        _write_archive(file, recorders, of_target)
    return list(files.values())


def _write_archive(path: Path, recorders: dict[str, Recorder], cubins: dict[tuple[str, str], Cubin]) -> None:
    """Write the machine code for a target, of every launch by file of kernels and variant, equal code once."""
    files = {cubin.name: cubin for cubin in sorted(cubins.values(), key=lambda cubin: cubin.name)}
    fields = ("symbol", "shared", "num_warps", "hidden")
    about = {name: {field: getattr(cubin, field) for field in fields} for name, cubin in files.items()}
    modules = {
        name: {
            "constants": recorder.constants(),
            "variants": {
                key: {"cubin": cubins[name, key].name, "divisible": sorted(launched.divisible)}
                for key, launched in recorder.launches.items()
            },
        }
        for name, recorder in recorders.items()
    }
    index = json.dumps({"modules": modules, "cubins": about}, indent=1).encode()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in [(INDEX, index), *((name, cubin.code) for name, cubin in files.items())]:
            entry = zipfile.ZipInfo(name)  # of no date: equal kernels make equal archives
            entry.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(entry, content)


@isolated()
def compile_all(jobs: dict[Any, Work], progress: Progress) -> dict[Any, Cubin]:
    """What the jobs make, in processes of their own: none of them has the interpreter turned on.

    Raises `CompileError` where a kernel cannot be compiled; the jobs that have not begun are dropped then.
    """
    cubins = {}
    workers = min(len(jobs), os.cpu_count() or 1)
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _prepare_worker)
    try:
        # decode takes longest by far
        order = sorted(jobs, key=lambda key: jobs[key].launched.kernel != "decode")
        waiting = {pool.submit(compile_work, jobs[key]): key for key in order}
        for done, future in enumerate(as_completed(waiting), 1):
            work = jobs[waiting[future]]
            try:
                cubins[waiting[future]] = future.result()
            except BrokenProcessPool:
                raise CompileError(
                    "a process that compiles kernels ended early, perhaps for want of memory; compile again with fewer "
                    "targets after --aot"
                ) from None
            except Exception as error:
                lines = (str(error).strip() or repr(error)).splitlines()
                reason = lines[-1 if lines[0].startswith("at ") else 0].strip()  # Triton shows the place first
                raise CompileError(
                    f"the kernel {work.launched.kernel} cannot be compiled for {work.target} ({reason}); leave "
                    f"{work.target} out of --aot, and please report this model"
                ) from error
            progress("kernels", done, len(jobs))
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    return cubins


def _prepare_worker() -> None:
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ["TRITON_DISABLE_LINE_INFO"] = "1"


def compile_work(work: Work) -> Cubin:
    """Compile a launch. Raises `ValueError` where the code takes other parameters than the launch has."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    launched = work.launched
    kernel = getattr(_imported(work.file), launched.kernel)
    names = list(kernel.arg_names)
    constants = {name: value for name, value in launched.keywords.items() if name in names}
    options = {name: value for name, value in launched.keywords.items() if name not in names}
    types = [tuple(kind) if isinstance(kind, list) else kind for kind in launched.types]
    signature = dict(zip(names, types, strict=False)) | dict.fromkeys(constants, "constexpr")
    source = ASTSource(
        kernel,
        signature,
        {(names.index(name),): value for name, value in constants.items()},
        {path: [["tt.divisibility", ALIGNMENT]] for path in _paths(types, launched.divisible)},
    )
    target = GPUTarget("cuda", int(work.target.removeprefix("sm_")), 32)
    compiled = triton.compile(source, target=target, options=options)
    metadata = compiled.metadata
    if metadata.global_scratch_size or metadata.profile_scratch_size or metadata.num_ctas != 1:
        raise ValueError("it needs memory or thread blocks beside its own")
    return Cubin(
        compiled.asm["cubin"],
        metadata.name,
        metadata.shared,
        metadata.num_warps,
        hidden_parameters(compiled.asm["ptx"], flat(types)),
    )


def _paths(types: Sequence[Any], places: set[int]) -> Iterator[tuple[int, ...]]:
    """Where arguments that have these places one by one are, as Triton counts: (argument,) or (argument, element)."""
    place = 0
    for at, kind in enumerate(types):
        for element in range(len(kind)) if isinstance(kind, tuple) else [None]:
            if place in places:
                yield (at,) if element is None else (at, element)
            place += 1


def hidden_parameters(ptx: str, types: Sequence[str]) -> int:
    """How many pointers a kernel takes behind parameters of the given types. Raises `ValueError` for any others."""
    entry = re.search(r"\.entry\s+\w+\s*\(([^)]*)\)", ptx)
    widths = re.findall(r"\.param\s+\.[a-z](\d+)", entry.group(1)) if entry else []
    expected = ["64" if kind.startswith("*") else "32" for kind in types]
    hidden = widths[len(expected) :]
    if widths[: len(expected)] != expected or set(hidden) - {"64"}:
        raise ValueError(f"its parameters have {widths} bits where {expected} were to be passed")
    return len(hidden)


def _imported(file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"{file.parent.parent.name}_{file.stem}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
