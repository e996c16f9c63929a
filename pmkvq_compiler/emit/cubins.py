"""Kernels compiled ahead of time, for devices that need not be there.

What to compile is not listed anywhere: the artifact's own launching code runs, on tensors without memory, through
whatever a cache can go through, and every launch that it asks for is compiled. The result goes into the artifact, where
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
    try:
        compiled = triton.compile(source, target=target, options=options)
    except Exception as error:
        reason: BaseException = error
        while reason.__cause__ is not None:  # Triton wraps it in an error for every call on the way
            reason = reason.__cause__
        raise reason from None
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
