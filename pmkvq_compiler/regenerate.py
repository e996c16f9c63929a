"""Write the Python of an artifact anew from its config and plan, and compare: `runtime.load(trust_code=False)`.

No code of the artifact is run. Transforms that were folded into the weights leave no trace in the code. Keys that are
rotated at run time do; the manifest names their layers.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from pmkvq_compiler.emit.package import emit_package
from pmkvq_compiler.emit.rehearsal import analysis
from pmkvq_compiler.errors import CompileError
from pmkvq_compiler.passes.base import run_passes
from pmkvq_compiler.passes.pipeline import pipeline
from pmkvq_compiler.passes.program import Program
from pmkvq_compiler.passes.rename_tensors import RenameTensors
from pmkvq_compiler.runtime.errors import ArtifactError
from pmkvq_compiler.runtime.manifest import Artifact
from pmkvq_compiler.source.capture import capture
from pmkvq_compiler.source.source import Source, open_source

DATA = (".safetensors", ".zip")
"""Binary files of the package, which are not compared: tensors, and machine code, which is not used without trust."""


def check_code(artifact: Artifact) -> None:
    """Raises `ArtifactError` if a Python file, or another text file of the package, differs by a byte from the one that
    this version of the compiler writes for the artifact's config and plan."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            source = open_source(str(artifact.folder.absolute()))
            emit_package(_program(artifact, source), source, Path(folder), artifact.manifest.package, source.whole)
            written = _texts(Path(folder))
    except (CompileError, ValueError) as error:
        raise ArtifactError(
            f"the code of {artifact.folder} cannot be written anew ({error}), so it cannot be compared; load it with "
            f"trust_code=True if you trust whoever made it"
        ) from error
    names = {name for name in artifact.manifest.files if _is_code(name, artifact.manifest.package)}
    for name in sorted(names | written.keys()):
        if name not in written or name not in names or _read(artifact, name) != written[name]:
            raise ArtifactError(
                f"{name} in {artifact.folder} is not what this version of pmkvq-compiler writes for its plan; compile "
                f"the model again, or load it with trust_code=True if you trust whoever made it"
            )


def _program(artifact: Artifact, source: Source) -> Program:
    """The program of the artifact's plan. Its rotations are identity matrices: the code depends only on which layers
    have one."""
    program = capture(source.config)
    run_passes(program, analysis(program))
    rotations = {
        site.layer: torch.eye(site.key_head_dim, dtype=torch.float64).repeat(site.num_key_value_heads, 1, 1)
        for site in program.cached_sites
        if site.layer in artifact.manifest.key_rotations
    }
    run_passes(program, pipeline({}, rotations, {}, artifact.manifest.plan))
    if source.whole is not None:
        run_passes(program, [RenameTensors(source.whole.beginnings)])
    return program


def _texts(folder: Path) -> dict[str, bytes]:
    names = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    package = next(path.name for path in folder.iterdir() if path.is_dir())
    return {name: path.read_bytes() for name, path in names.items() if _is_code(name, package)}


def _is_code(name: str, package: str) -> bool:
    return name.endswith(".py") or (name.startswith(f"{package}/") and not name.endswith(DATA))


def _read(artifact: Artifact, name: str) -> bytes:
    within = name.removeprefix(f"{artifact.manifest.package}/")
    return artifact.files.read(name) if within == name else artifact.package.read(within)
