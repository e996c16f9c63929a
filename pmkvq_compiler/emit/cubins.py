"""Compiles kernels ahead of time, for GPUs that this machine need not have.

There is no list of what to compile. Instead, the artifact's launching code runs on tensors without memory, through all
states that a cache can be in, and every launch that it makes is compiled. The result goes into the artifact, where
`pmkvq_compiler.runtime.cubins` finds it.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import multiprocessing
import os
import re
import zipfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pmkvq_compiler.children import isolated
from pmkvq_compiler.emit.launches import Launched, Recorder, imported, launches_of
from pmkvq_compiler.errors import CompileError, UsageError
from pmkvq_compiler.options import TARGETS
from pmkvq_compiler.progress import Progress
from pmkvq_compiler.runtime.cubins import ALIGNMENT, INDEX, flat
from pmkvq_compiler.runtime.errors import InputError
from pmkvq_compiler.runtime.kernels import check_kernels
from pmkvq_compiler.runtime.plan import CachePlan


def check_targets(targets: Sequence[str]) -> None:
    """Raises `UsageError` if this machine cannot compile kernels for the targets."""
    for target in targets:
        if target not in TARGETS:
            raise UsageError(f"--aot target {target!r} is not known; choose from {', '.join(TARGETS)}")
    if targets and importlib.util.find_spec("triton") is None:
        raise UsageError(
            "--aot needs the package triton, which is not installed; run `pip install triton`, or leave --aot out"
        )


def check_plan(plan: CachePlan) -> None:
    """Raises `UsageError` if the kernels do not support the plan."""
    try:
        for layer in plan.layers:
            check_kernels(layer)
    except InputError as error:
        raise UsageError(f"--aot compiles Triton kernels, but {error}, or leave --aot out") from error


@dataclass(frozen=True)
class Work:
    """A launch to compile: of a kernel in `file`, for a target."""

    file: Path
    launched: Launched
    target: str


@dataclass(frozen=True)
class Cubin:
    """The machine code of a kernel. Triton adds `hidden` parameters after the kernel's own; they are null pointers."""

    code: bytes
    symbol: str
    shared: int
    num_warps: int
    hidden: int

    @property
    def name(self) -> str:
        return hashlib.sha256(self.code).hexdigest()[:16] + ".cubin"


def write_cubins(package: Path, checkpoint: Sequence[Path], targets: Sequence[str], progress: Progress) -> list[Path]:
    """Compile every kernel of the artifact's `package` for the targets, into `kernels/aot/` there; returns the files.

    Raises `CompileError` if a kernel cannot be compiled.
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
            entry = zipfile.ZipInfo(name)  # without a date, so that equal kernels make equal archives
            entry.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(entry, content)


@isolated()
def compile_all(jobs: dict[Any, Work], progress: Progress) -> dict[Any, Cubin]:
    """Compile all jobs in separate processes, in which Triton's interpreter is off; returns the results by job.

    Raises `CompileError` if a kernel cannot be compiled, and drops the jobs that have not begun.
    """
    cubins = {}
    workers = min(len(jobs), os.cpu_count() or 1)
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _prepare_worker)
    try:
        # decode takes the longest by far, so it goes first
        order = sorted(jobs, key=lambda key: jobs[key].launched.kernel != "decode")
        waiting = {pool.submit(compile_work, jobs[key]): key for key in order}
        for done, future in enumerate(as_completed(waiting), 1):
            work = jobs[waiting[future]]
            try:
                cubins[waiting[future]] = future.result()
            except BrokenProcessPool:
                raise CompileError(
                    "a process that compiles kernels ended early, perhaps because memory ran out; compile again with "
                    "fewer targets after --aot"
                ) from None
            except Exception as error:
                lines = (str(error).strip() or repr(error)).splitlines()
                reason = lines[-1 if lines[0].startswith("at ") else 0].strip()  # Triton prints the location first
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
    """Compile a launch. Raises `ValueError` if the compiled code takes other parameters than the launch passes."""
    compiled = compiled_by_triton(work)
    metadata = compiled.metadata
    if metadata.global_scratch_size or metadata.profile_scratch_size or metadata.num_ctas != 1:
        raise ValueError("it needs scratch memory or clusters of thread blocks, which the runtime does not provide")
    return Cubin(
        compiled.asm["cubin"],
        metadata.name,
        metadata.shared,
        metadata.num_warps,
        hidden_parameters(compiled.asm["ptx"], flat(work.launched.types)),
    )


@dataclass(frozen=True)
class Machine:
    """Takes the place of Triton's driver, which kernels ask what they are compiled for: with it, that is the target,
    whatever GPU this machine has, or none."""

    target: Any

    def get_current_target(self) -> Any:
        return self.target


def compiled_by_triton(work: Work) -> Any:
    """What Triton makes of a launch, in a process that compiles and does not launch."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    launched = work.launched
    kernel = getattr(imported(work.file), launched.kernel)
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
    triton.runtime.driver.set_active(Machine(target))
    try:
        return triton.compile(source, target=target, options=options)
    except Exception as error:
        reason: BaseException = error
        while reason.__cause__ is not None:  # Triton wraps an error once for every call in the kernel
            reason = reason.__cause__
        raise reason from None


def _paths(types: Sequence[Any], places: set[int]) -> Iterator[tuple[int, ...]]:
    """Triton's paths, (argument,) or (argument, element), for `places` that are counted with tuples flattened."""
    place = 0
    for at, kind in enumerate(types):
        for element in range(len(kind)) if isinstance(kind, tuple) else [None]:
            if place in places:
                yield (at,) if element is None else (at, element)
            place += 1


def hidden_parameters(ptx: str, types: Sequence[str]) -> int:
    """How many pointers a kernel takes after parameters of the given types. Raises `ValueError` if there are others."""
    entry = re.search(r"\.entry\s+\w+\s*\(([^)]*)\)", ptx)
    widths = re.findall(r"\.param\s+\.[a-z](\d+)", entry.group(1)) if entry else []
    expected = ["64" if kind.startswith("*") else "32" for kind in types]
    hidden = widths[len(expected) :]
    if widths[: len(expected)] != expected or set(hidden) - {"64"}:
        raise ValueError(f"its parameters have {widths} bits, but {expected} are expected")
    return len(hidden)
